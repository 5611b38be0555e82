//! The processor and the memory, as Linux tells them.

use std::collections::BTreeSet;
use std::fs;
use std::thread::available_parallelism;

use serde::Serialize;

/// Instruction sets that matrix products are fast by; names as in /proc/cpuinfo.
const MATTER: [&str; 9] = [
    "avx2",
    "fma",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "asimd",
    "bf16",
];

#[derive(Debug, Serialize)]
pub struct Cpu {
    pub model: String,
    /// That this process may use.
    pub cores: usize,
    pub instruction_sets: Vec<String>,
}

#[derive(Debug, Serialize)]
pub struct Memory {
    pub total_bytes: u64,
    pub available_bytes: u64,
    /// Of this container, where it has one.
    pub limit_bytes: Option<u64>,
}

impl Cpu {
    pub fn here() -> Self {
        Self::of(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default())
    }

    fn of(cpuinfo: &str) -> Self {
        let value = |names: [&str; 2]| {
            cpuinfo.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                names.contains(&name.trim()).then(|| value.trim())
            })
        };
        let has: BTreeSet<&str> = value(["flags", "Features"])
            .unwrap_or_default()
            .split_whitespace()
            .collect();
        Self {
            model: value(["model name", "CPU part"])
                .unwrap_or("unknown")
                .to_owned(),
            cores: available_parallelism().map_or(1, usize::from),
            instruction_sets: MATTER
                .into_iter()
                .filter(|name| has.contains(name))
                .map(str::to_owned)
                .collect(),
        }
    }
}

impl Memory {
    pub fn here() -> Self {
        let limit = fs::read_to_string("/sys/fs/cgroup/memory.max");
        Self {
            limit_bytes: limit.ok().and_then(|text| text.trim().parse().ok()),
            ..Self::of(&fs::read_to_string("/proc/meminfo").unwrap_or_default())
        }
    }

    fn of(meminfo: &str) -> Self {
        let bytes = |name: &str| -> u64 {
            let kib = meminfo.lines().find_map(|line| {
                let value = line.strip_prefix(name)?.strip_prefix(':')?;
                value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
            });
            kib.unwrap_or(0) * 1024
        };
        Self {
            total_bytes: bytes("MemTotal"),
            available_bytes: bytes("MemAvailable"),
            limit_bytes: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_and_memory_are_read_as_linux_writes_them() {
        let cpu = Cpu::of(
            "processor\t: 0\nmodel name\t: AMD EPYC 9B45\nflags\t\t: fpu avx2 avx512f avx512_bf16x\n",
        );
        assert_eq!(cpu.model, "AMD EPYC 9B45");
        assert_eq!(cpu.instruction_sets, ["avx2", "avx512f"]);
        let memory = Memory::of("MemTotal:       16 kB\nMemFree: 3 kB\nMemAvailable:    8 kB\n");
        assert_eq!(
            (memory.total_bytes, memory.available_bytes),
            (16 << 10, 8 << 10)
        );
    }

    #[test]
    fn this_machine_has_some_of_both() {
        assert!(Cpu::here().cores >= 1);
        let memory = Memory::here();
        assert!(memory.available_bytes > 0 && memory.total_bytes >= memory.available_bytes);
    }
}
