//! The platform that the engine runs on, for operators of workers.

use tch::Device;

use crate::device;
use crate::device::memory::Memory;
use crate::device::nvidia::Nvidia;
use crate::vit::Compute;
use promptweave_domain::composer::Platform;

/// Queries the driver again on each call, which is once at every start.
pub fn of(compute: &Compute) -> Platform {
    let devices = &compute.devices;
    let on_cpu = devices.contains(&Device::Cpu);
    let arithmetic = format!(
        "promptweave {}, libtorch {}, {}, {}{}",
        env!("CARGO_PKG_VERSION"),
        device::LIBTORCH,
        if on_cpu { "cpu" } else { "cuda" },
        compute.precision.name(),
        if compute.plain { ", plain" } else { "" },
    );
    let here = Platform {
        arithmetic,
        device: device::names_of(devices),
        driver: None,
        memory_bytes: None,
        libtorch: device::loaded_version(),
    };
    if on_cpu {
        return Platform {
            memory_bytes: Some(Memory::here().usable_bytes()),
            ..here
        };
    }
    let Nvidia {
        driver,
        devices: cards,
        ..
    } = Nvidia::here();
    let bytes = |device: &Device| match device {
        Device::Cuda(index) => cards.get(*index).map(|card| card.memory_bytes),
        _ => None,
    };
    Platform {
        driver,
        memory_bytes: devices.iter().map(bytes).sum(),
        ..here
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use promptweave_domain::precision::Precision;

    #[test]
    fn a_cpu_has_this_machines_memory_and_no_driver() {
        let platform = of(&Compute::on(Device::Cpu, Precision::Bf16));
        assert!(platform.arithmetic.ends_with(", cpu, bf16"), "{platform:?}");
        assert_eq!(platform.device, "cpu");
        assert_eq!(platform.driver, None);
        assert!(platform.memory_bytes.is_some_and(|bytes| bytes > 1 << 20));
        assert_eq!(platform.libtorch.as_deref(), Some(device::LIBTORCH));
    }
}
