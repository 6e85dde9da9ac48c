//! What a guest under TCG is told of its clocks, so that it does not have to find out.
//!
//! TCG hands the host's time stamp counter through and offers no paravirtual clock. A guest that
//! measures how fast that counter runs, against a timer that is emulated on a busy host, gets it
//! wrong ("could not calculate TSC khz") and falls back to jiffies: clock and timers then have a
//! resolution of 4 ms. So the host measures, once in the daemon's life.

use std::sync::OnceLock;

/// Ticks of the guest kernel's timer in a second (`CONFIG_HZ` of the kernels that we build). For
/// another kernel the delay loop is off by the ratio, which the time stamp counter outweighs.
const HZ: u64 = 250;

/// Kernel parameters (kernel-parameters.txt of Linux): rate of the time stamp counter in kHz, that
/// it can be trusted, that timer interrupts need no test, loops of the delay loop in a tick.
/// Nothing where the rate is not known.
pub fn parameters(khz: Option<u64>) -> Vec<String> {
    let Some(khz) = khz else { return Vec::new() };
    vec![
        format!("tsc_early_khz={khz}"),
        "tsc=reliable".into(),
        "no_timer_check".into(),
        format!("lpj={}", khz.saturating_mul(1000) / HZ),
    ]
}

/// The host's rate in kHz, measured at the first call, which takes `measure::FOR`: call it
/// where that does no harm.
pub fn host_khz() -> Option<u64> {
    static RATE: OnceLock<Option<u64>> = OnceLock::new();
    *RATE.get_or_init(measure::khz)
}

#[cfg(target_arch = "x86_64")]
mod measure {
    use std::time::Duration;

    /// A microsecond of error in it is 20 ppm; the daemon sets the guest's clock now and then.
    pub const FOR: Duration = Duration::from_millis(50);
    /// What a processor can have.
    const SENSE: std::ops::Range<u64> = 100_000..20_000_000;

    /// Looks at both clocks, of which the one between the two looks at the other that are closest
    /// counts: this thread may be put aside between any two of them.
    const LOOKS: usize = 16;

    fn ticks() -> u64 {
        // SAFETY: reads a counter that every x86_64 processor has.
        unsafe { std::arch::x86_64::_rdtsc() }
    }

    /// Nanoseconds and ticks of the same moment.
    fn now() -> Option<(u128, u64)> {
        let look = || {
            let before = ticks();
            // The clock that nobody slews.
            let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC_RAW).ok()?;
            let apart = ticks().checked_sub(before)?;
            let seconds = u128::try_from(time.tv_sec()).ok()?;
            let time = seconds * 1_000_000_000 + u128::try_from(time.tv_nsec()).ok()?;
            Some((apart, time, before + apart / 2))
        };
        let looks = (0..LOOKS).filter_map(|_| look());
        let (_, time, ticks) = looks.min_by_key(|(apart, ..)| *apart)?;
        Some((time, ticks))
    }

    pub fn khz() -> Option<u64> {
        let (begin, first) = now()?;
        std::thread::sleep(FOR);
        let (end, last) = now()?;
        let ticks = u128::from(last.checked_sub(first)?);
        let khz = u64::try_from(ticks * 1_000_000 / end.checked_sub(begin)?.max(1)).ok()?;
        SENSE.contains(&khz).then_some(khz)
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod measure {
    pub fn khz() -> Option<u64> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_told_the_rate_and_nothing_where_it_is_not_known() {
        let told = parameters(Some(2_445_380)).join(" ");
        assert_eq!(told, "tsc_early_khz=2445380 tsc=reliable no_timer_check lpj=9781520");
        assert!(parameters(None).is_empty());
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn the_rate_is_the_same_twice() {
        let (Some(one), Some(two)) = (measure::khz(), measure::khz()) else {
            eprintln!("skipped: the time stamp counter of this host makes no sense");
            return;
        };
        // Another virtual processor between the two looks would show here.
        assert!(one.abs_diff(two) < one / 1000, "{one} {two}");
    }
}
