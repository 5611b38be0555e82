//! The machine's memory, as Linux reports it.

use std::fs;

use serde::Serialize;

#[derive(Debug, Serialize)]
pub struct Memory {
    pub total_bytes: u64,
    pub available_bytes: u64,
    /// The memory limit of this container, if it has one.
    pub limit_bytes: Option<u64>,
}

impl Memory {
    pub fn here() -> Self {
        let limit = fs::read_to_string("/sys/fs/cgroup/memory.max");
        Self {
            limit_bytes: limit.ok().and_then(|text| text.trim().parse().ok()),
            ..Self::of(&meminfo())
        }
    }

    /// The most memory that a process here may have.
    pub fn usable_bytes(&self) -> u64 {
        self.total_bytes.min(self.limit_bytes.unwrap_or(u64::MAX))
    }

    fn of(meminfo: &str) -> Self {
        let bytes = |name: &str| bytes_of(meminfo, name).unwrap_or(0);
        Self {
            total_bytes: bytes("MemTotal"),
            available_bytes: bytes("MemAvailable"),
            limit_bytes: None,
        }
    }
}

/// Bytes that are available without swapping, if the system reports them.
pub fn available_bytes() -> Option<u64> {
    bytes_of(&meminfo(), "MemAvailable")
}

fn meminfo() -> String {
    fs::read_to_string("/proc/meminfo").unwrap_or_default()
}

/// The value of one line of `/proc/meminfo`.
fn bytes_of(meminfo: &str, name: &str) -> Option<u64> {
    let kib = meminfo.lines().find_map(|line| {
        let value = line.strip_prefix(name)?.strip_prefix(':')?;
        value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    });
    kib.map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_as_linux_writes_it() {
        let mut memory =
            Memory::of("MemTotal:       16 kB\nMemFree: 3 kB\nMemAvailable:    8 kB\n");
        assert_eq!(
            (memory.total_bytes, memory.available_bytes),
            (16 << 10, 8 << 10)
        );
        assert_eq!(memory.usable_bytes(), 16 << 10);
        memory.limit_bytes = Some(4 << 10);
        assert_eq!(memory.usable_bytes(), 4 << 10);
    }

    #[test]
    fn this_machine_has_some() {
        let memory = Memory::here();
        assert!(memory.available_bytes > 0 && memory.total_bytes >= memory.available_bytes);
    }
}
