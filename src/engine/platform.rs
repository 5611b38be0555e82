//! What the engine computes on, for those who look after workers.

use tch::Device;

use super::device;
use super::memory::Memory;
use super::nvidia::Nvidia;
use crate::domain::composition::Platform;

/// Asks the driver anew: it is called once a start.
pub fn of(devices: &[Device]) -> Platform {
    let here = Platform {
        device: device::names_of(devices),
        driver: None,
        memory_bytes: None,
        libtorch: device::loaded_version(),
    };
    if devices.contains(&Device::Cpu) {
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

    #[test]
    fn a_cpu_has_this_machines_memory_and_no_driver() {
        let platform = of(&[Device::Cpu]);
        assert_eq!(platform.device, "cpu");
        assert_eq!(platform.driver, None);
        assert!(platform.memory_bytes.is_some_and(|bytes| bytes > 1 << 20));
        assert_eq!(platform.libtorch.as_deref(), Some(device::LIBTORCH));
    }
}
