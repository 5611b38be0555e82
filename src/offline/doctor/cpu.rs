//! The processor, as Linux reports it.

use std::collections::BTreeSet;
use std::fs;
use std::thread::available_parallelism;

use serde::Serialize;

/// Instruction sets that make matrix products fast, named as in /proc/cpuinfo.
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
    /// Cores that this process may use.
    pub cores: usize,
    pub instruction_sets: Vec<String>,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_is_read_as_linux_writes_it() {
        let cpu = Cpu::of(
            "processor\t: 0\nmodel name\t: AMD EPYC 9B45\nflags\t\t: fpu avx2 avx512f avx512_bf16x\n",
        );
        assert_eq!(cpu.model, "AMD EPYC 9B45");
        assert_eq!(cpu.instruction_sets, ["avx2", "avx512f"]);
    }

    #[test]
    fn this_machine_has_one() {
        assert!(Cpu::here().cores >= 1);
    }
}
