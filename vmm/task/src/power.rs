//! The end of the machine.
//!
//! A machine with ACPI (q35, Cloud Hypervisor) is switched off by the firmware, an arm64 machine
//! by PSCI. QEMU's `microvm` with `acpi=off`, Firecracker and StratoVirt's microvm have nothing
//! that could be switched off on x86: the kernel would only halt, and the VMM run on. There a
//! reset ends the VMM (QEMU with `-no-reboot`, the kernel with `reboot=t` or `reboot=k`). Which of
//! both is seen by `/sys/firmware/acpi`; `kuasar.poweroff=` overrides it.

use std::path::Path;
use std::time::Duration;

use kuasar_host::cgroup::Layout;
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cmdline::PowerOff;
use crate::limits;

fn mode(how: PowerOff, x86: bool, acpi: bool) -> RebootMode {
    match how {
        PowerOff::PowerOff => RebootMode::RB_POWER_OFF,
        PowerOff::Reboot => RebootMode::RB_AUTOBOOT,
        PowerOff::Auto if x86 && !acpi => RebootMode::RB_AUTOBOOT,
        PowerOff::Auto => RebootMode::RB_POWER_OFF,
    }
}

/// Writes everything back and ends the machine. Only for PID 1.
pub fn end(how: PowerOff) -> ! {
    unmount();
    nix::unistd::sync();
    let acpi = Path::new("/sys/firmware/acpi").exists();
    let mode = mode(how, cfg!(target_arch = "x86_64"), acpi);
    // It only returns when it fails, and the other way may do.
    let _ = reboot(mode);
    let _ = reboot(RebootMode::RB_AUTOBOOT);
    loop {
        nix::unistd::pause();
    }
}

/// Filesystems of the pod's and the containers', so that they are clean.
fn unmount() {
    let below = kuasar_host::mount::mounts_below(Path::new(crate::boot::DIR)).unwrap_or_default();
    for path in below.iter().rev() {
        let flags = nix::mount::MntFlags::UMOUNT_NOFOLLOW;
        // What is still in use is synced all the same.
        let _ = nix::mount::umount2(path, flags);
    }
}

/// Asks everything to end, kills what does not, and ends the machine. Only for PID 1.
pub async fn shutdown(grace: Duration, how: PowerOff) -> ! {
    let everybody = Pid::from_raw(-1);
    let grace = grace.min(limits::GRACE);
    let ended = |limit: Duration| {
        tokio::task::spawn_blocking(move || {
            let pod = Layout::detect().and_then(|layout| layout.group(crate::boot::POD_NAME));
            pod.and_then(|pod| pod.wait_empty(limit)).unwrap_or(false)
        })
    };
    if !grace.is_zero() {
        // Whoever has none of it is killed below.
        let _ = kill(everybody, Signal::SIGTERM);
        if !ended(grace).await.unwrap_or(false) {
            tracing::info!(?grace, "some processes have not ended: they are killed");
        }
    }
    let _ = kill(everybody, Signal::SIGKILL);
    let _ = ended(limits::KILLED).await;
    end(how)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_acpi_is_reset() {
        let auto = PowerOff::Auto;
        assert_eq!(mode(auto, true, true), RebootMode::RB_POWER_OFF);
        assert_eq!(mode(auto, true, false), RebootMode::RB_AUTOBOOT);
        assert_eq!(mode(auto, false, false), RebootMode::RB_POWER_OFF);
        assert_eq!(mode(PowerOff::PowerOff, true, false), RebootMode::RB_POWER_OFF);
        assert_eq!(mode(PowerOff::Reboot, false, true), RebootMode::RB_AUTOBOOT);
    }
}
