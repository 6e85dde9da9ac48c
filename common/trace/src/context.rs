//! W3C Trace Context, level 1: `00-<trace id>-<span id>-<flags>`, in lower-case hex.

use std::fmt;

/// Ids of a span, and whether its trace is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Context {
    /// The trace.
    pub trace: [u8; 16],
    /// The span.
    pub span: [u8; 8],
    /// Whether the trace is kept by whoever began it.
    pub sampled: bool,
}

/// Random bytes from the kernel, never all zero: that is no id.
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0_u8; N];
    // SAFETY: pointer and length describe `bytes`.
    unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), N, 0) };
    if let (true, Some(first)) = (bytes.iter().all(|b| *b == 0), bytes.first_mut()) {
        *first = 1;
    }
    bytes
}

fn hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digit = |c: u8| match c {
        b'0'..=b'9' => Some(c - b'0'),
        // Upper case is not allowed.
        b'a'..=b'f' => Some(c - b'a' + 10),
        _ => None,
    };
    if text.len() != 2 * N {
        return None;
    }
    let mut out = [0; N];
    for (byte, pair) in out.iter_mut().zip(text.as_bytes().chunks(2)) {
        let [high, low] = pair else { return None };
        *byte = digit(*high)? << 4 | digit(*low)?;
    }
    Some(out)
}

impl Context {
    /// Reads a `traceparent`. A later version may have more fields, which are left alone; what is
    /// malformed counts as not there, as the specification says.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.trim().split('-');
        let [version] = hex::<1>(parts.next()?)?;
        let trace = hex::<16>(parts.next()?)?;
        let span = hex::<8>(parts.next()?)?;
        let [flags] = hex::<1>(parts.next()?)?;
        let more = parts.next().is_some();
        let none = trace.iter().all(|b| *b == 0) || span.iter().all(|b| *b == 0);
        if version == 0xff || none || (version == 0 && more) {
            return None;
        }
        Some(Self { trace, span, sampled: flags & 1 == 1 })
    }

    /// A new trace.
    pub fn root() -> Self {
        Self { trace: random(), span: random(), sampled: true }
    }

    /// A new span of the same trace.
    #[must_use]
    pub fn child(&self) -> Self {
        Self { span: random(), ..*self }
    }
}

impl fmt::Display for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("00-")?;
        self.trace.iter().try_for_each(|b| write!(f, "{b:02x}"))?;
        f.write_str("-")?;
        self.span.iter().try_for_each(|b| write!(f, "{b:02x}"))?;
        write!(f, "-{:02x}", u8::from(self.sampled))
    }
}
