//! Frames, and how they are told apart in a stream of bytes.
//!
//! A frame is stuffed (COBS: Cheshire and Baker, "Consistent Overhead Byte Stuffing", 1999): no
//! byte of it is zero then, and a zero ends it. So whoever begins to listen in the middle is in step
//! again at the next zero, and nothing that a frame carries can be taken for its end.
//!
//! ```text
//! session u64 | stream u32 | argument u32 | length u16 | kind u8 | version u8 | check u32 | payload
//! ```
//!
//! All numbers are little-endian. `check` is the CRC-32 of what stands before it and of the payload: what
//! is left of two frames of which the middle is missing is no frame, and neither is one in which a
//! byte has changed. A frame that is left out is missed at its stream: what carries bytes or ends them
//! says how many came before.

use crate::mux::VERSION;

/// Bytes before the payload.
const HEADER: usize = 24;
/// Bytes of the header before `check`.
const CHECKED: usize = 20;
/// Most bytes of a payload.
pub const PAYLOAD: usize = 8 * 1024;
/// Most bytes between two zeros.
pub const MOST: usize = HEADER + PAYLOAD + (HEADER + PAYLOAD) / 254 + 1;

/// What a frame says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Guest: I am here. In no session.
    Hello = 1,
    /// Host: from now on this session.
    Sync,
    /// Guest: the session has begun.
    Begun,
    /// A new stream to the port that is the argument.
    Open,
    /// The stream is accepted.
    Accept,
    /// Bytes of a stream; the argument is how many it had before, modulo 2^32.
    Data,
    /// So many more bytes may come.
    Window,
    /// No more bytes come; the argument is how many came.
    End,
    /// No more bytes are read.
    Stop,
    /// The stream is no more, or was never accepted.
    Reset,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Hello,
        Self::Sync,
        Self::Begun,
        Self::Open,
        Self::Accept,
        Self::Data,
        Self::Window,
        Self::End,
        Self::Stop,
        Self::Reset,
    ];
}

/// A frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Of which session; 0 is none.
    pub session: u64,
    /// Of which stream; 0 is none.
    pub stream: u32,
    /// What it says.
    pub kind: Kind,
    /// A port, or a number of bytes: see [`Kind`].
    pub argument: u32,
    /// Bytes of a stream, at most [`PAYLOAD`].
    pub payload: Vec<u8>,
}

/// What a byte does to a CRC-32 (IEEE 802.3) with so many bytes behind it: eight steps can be taken at once.
#[allow(clippy::indexing_slicing, reason = "the compiler runs it, and would say so")]
static STEPS: [[u32; 256]; 8] = {
    let mut steps = [[0; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let (mut crc, mut bit) = (byte as u32, 0);
        while bit < 8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 };
            bit += 1;
        }
        steps[0][byte] = crc;
        byte += 1;
    }
    let mut behind = 1;
    while behind < 8 {
        let mut byte = 0;
        while byte < 256 {
            let before = steps[behind - 1][byte];
            steps[behind][byte] = (before >> 8) ^ steps[0][(before & 0xff) as usize];
            byte += 1;
        }
        behind += 1;
    }
    steps
};

#[allow(clippy::indexing_slicing, reason = "a byte is below 256, and `behind` a constant")]
fn step(behind: usize, byte: u8) -> u32 {
    STEPS[behind][usize::from(byte)]
}

/// A CRC-32 that has come so far, with these bytes more.
fn crc_on(mut crc: u32, bytes: &[u8]) -> u32 {
    // A guest under TCG takes most of its time for a stream here, when it goes by single bytes.
    let (eights, rest) = bytes.as_chunks::<8>();
    for eight in eights {
        let [a, b, c, d, e, f, g, h] = (u64::from_le_bytes(*eight) ^ u64::from(crc)).to_le_bytes();
        crc = step(7, a) ^ step(6, b) ^ step(5, c) ^ step(4, d);
        crc ^= step(3, e) ^ step(2, f) ^ step(1, g) ^ step(0, h);
    }
    rest.iter().fold(crc, |crc, byte| (crc >> 8) ^ step(0, *byte ^ crc as u8))
}

/// CRC-32 (IEEE 802.3) of both, one behind the other.
fn crc(header: &[u8], payload: &[u8]) -> u32 {
    !crc_on(crc_on(u32::MAX, header), payload)
}

/// How many bytes come before the first zero: eight are looked at at once.
fn before_zero(bytes: &[u8]) -> usize {
    const ONES: u64 = u64::MAX / 255;
    let (eights, rest) = bytes.as_chunks::<8>();
    for (n, eight) in eights.iter().enumerate() {
        let eight = u64::from_le_bytes(*eight);
        // The lowest bit that is set here is the highest of the first zero.
        let zeros = eight.wrapping_sub(ONES) & !eight & (ONES << 7);
        if zeros != 0 {
            return 8 * n + zeros.trailing_zeros() as usize / 8;
        }
    }
    let at = rest.iter().position(|byte| *byte == 0).unwrap_or(rest.len());
    bytes.len() - rest.len() + at
}

/// How many bytes at the beginning are this one.
fn run_of(byte: u8, bytes: &[u8]) -> usize {
    let same = u64::from_le_bytes([byte; 8]);
    let (eights, _) = bytes.as_chunks::<8>();
    let n = 8 * eights.iter().take_while(|eight| u64::from_le_bytes(**eight) == same).count();
    n + bytes.iter().skip(n).take_while(|other| **other == byte).count()
}

fn stuff(from: &[u8], to: &mut Vec<u8>) {
    let mut rest = from;
    loop {
        // What is between two zeros is a run, and one of no bytes is a 1.
        let zeros = run_of(0, rest);
        to.resize(to.len() + zeros, 1);
        rest = rest.get(zeros..).unwrap_or_default();
        let (mut run, tail) = rest.split_at(before_zero(rest));
        while let Some((full, more)) = run.split_at_checked(254) {
            to.push(255);
            to.extend_from_slice(full);
            run = more;
        }
        // Below 254 now.
        to.push(run.len() as u8 + 1);
        to.extend_from_slice(run);
        match tail.split_first() {
            Some((_, tail)) => rest = tail,
            None => return,
        }
    }
}

fn unstuff(from: &[u8], to: &mut Vec<u8>) -> Option<()> {
    let mut rest = from;
    while let Some((code, tail)) = rest.split_first() {
        if *code == 1 {
            // The last one of all has no zero behind it.
            let ones = run_of(1, rest);
            rest = rest.get(ones..).unwrap_or_default();
            to.resize(to.len() + ones - usize::from(rest.is_empty()), 0);
            continue;
        }
        let (run, tail) = tail.split_at_checked(usize::from(*code).checked_sub(1)?)?;
        to.extend_from_slice(run);
        if *code < 255 && !tail.is_empty() {
            to.push(0);
        }
        rest = tail;
    }
    Some(())
}

impl Frame {
    /// Appends it, stuffed, and its end.
    pub fn write(&self, to: &mut Vec<u8>) {
        let mut plain = Vec::with_capacity(HEADER + self.payload.len());
        plain.extend_from_slice(&self.session.to_le_bytes());
        plain.extend_from_slice(&self.stream.to_le_bytes());
        plain.extend_from_slice(&self.argument.to_le_bytes());
        plain.extend_from_slice(&(self.payload.len() as u16).to_le_bytes());
        plain.extend_from_slice(&[self.kind as u8, VERSION]);
        plain.extend_from_slice(&crc(&plain, &self.payload).to_le_bytes());
        plain.extend_from_slice(&self.payload);
        stuff(&plain, to);
        to.push(0);
    }

    /// What stood between two zeros; nothing when that is no frame.
    fn read(stuffed: &[u8]) -> Option<Self> {
        let mut plain = Vec::with_capacity(stuffed.len());
        unstuff(stuffed, &mut plain)?;
        let (header, payload) = plain.split_at_checked(HEADER)?;
        let (checked, check) = header.split_at_checked(CHECKED)?;
        if check != crc(checked, payload).to_le_bytes() {
            return None;
        }
        let mut rest = checked;
        let mut take = |n: usize| {
            let (number, tail) = rest.split_at_checked(n)?;
            rest = tail;
            Some(number.iter().rev().fold(0_u64, |all, byte| all << 8 | u64::from(*byte)))
        };
        let (session, stream, argument) = (take(8)?, take(4)? as u32, take(4)? as u32);
        let (length, kind, version) = (take(2)?, take(1)?, take(1)?);
        let kind = Kind::ALL.into_iter().find(|known| u64::from(*known as u8) == kind)?;
        if version != u64::from(VERSION)
            || length != payload.len() as u64
            || payload.len() > PAYLOAD
        {
            return None;
        }
        let payload = plain.split_off(HEADER);
        Some(Self { session, stream, kind, argument, payload })
    }
}

/// Finds frames in what comes.
#[derive(Debug, Default)]
pub struct Finder {
    kept: Vec<u8>,
    /// What comes up to the next zero is too long to be a frame.
    lost: bool,
}

impl Finder {
    /// Answers the frames that end in `bytes`. What is none is left out.
    pub fn find(&mut self, bytes: &[u8]) -> Vec<Frame> {
        let mut all = Vec::new();
        let mut rest = bytes;
        loop {
            let (piece, tail) = rest.split_at(before_zero(rest));
            if self.kept.len() + piece.len() > MOST {
                self.lost = true;
                self.kept = Vec::new();
            }
            if !self.lost {
                self.kept.extend_from_slice(piece);
            }
            // Behind every piece but the last there is a zero.
            let Some((_, tail)) = tail.split_first() else { return all };
            if !self.lost && !self.kept.is_empty() {
                all.extend(Frame::read(&self.kept));
            }
            self.lost = false;
            self.kept.clear();
            rest = tail;
        }
    }

    /// Bytes that are kept of a frame that has not ended.
    pub fn kept(&self) -> usize {
        self.kept.len()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// xorshift64: looks random, and is the same each time.
    pub(crate) struct Random(pub(crate) u64);

    impl Random {
        pub(crate) fn next(&mut self) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0
        }

        pub(crate) fn below(&mut self, n: usize) -> usize {
            (self.next() % n as u64) as usize
        }

        /// So many bytes, some of them zeros.
        pub(crate) fn bytes(&mut self, n: usize) -> Vec<u8> {
            let zeros = self.below(4);
            (0..n).map(|_| if self.below(4) < zeros { 0 } else { self.next() as u8 }).collect()
        }

        pub(crate) fn frame(&mut self) -> Frame {
            let n = if self.below(8) == 0 { self.below(PAYLOAD + 1) } else { self.below(600) };
            Frame {
                session: self.next() % 3,
                stream: self.next() as u32 % 8,
                kind: Kind::ALL[self.below(10)],
                argument: self.next() as u32,
                payload: self.bytes(n),
            }
        }
    }

    #[test]
    fn a_frame_is_read_as_it_was_written_however_it_comes() {
        let mut random = Random(7);
        let lengths = [0, 1, 229, 230, 231, 253, 254, 255, 508, 509, PAYLOAD - 1, PAYLOAD];
        for (n, fill) in lengths.into_iter().flat_map(|n| [(n, 0), (n, 1), (n, 255)]) {
            let frame = Frame { payload: vec![fill; n], ..random.frame() };
            let mut bytes = Vec::new();
            frame.write(&mut bytes);
            assert!(bytes.len() <= MOST + 1, "{n}: {}", bytes.len());
            assert_eq!(bytes.iter().filter(|byte| **byte == 0).count(), 1);
            assert_eq!(Finder::default().find(&bytes), [frame]);
        }
        let frames: Vec<Frame> = (0..200).map(|_| random.frame()).collect();
        let mut bytes = Vec::new();
        frames.iter().for_each(|frame| frame.write(&mut bytes));
        let (mut finder, mut found, mut rest) = (Finder::default(), Vec::new(), &bytes[..]);
        while !rest.is_empty() {
            let (piece, tail) = rest.split_at((1 + random.below(900)).min(rest.len()));
            found.extend(finder.find(piece));
            rest = tail;
        }
        assert!(found == frames);
    }

    #[test]
    fn what_is_torn_is_no_frame_and_the_next_one_is_found() {
        let mut random = Random(11);
        for _ in 0..400 {
            let (one, other, next) = (random.frame(), random.frame(), random.frame());
            let (mut first, mut second) = (Vec::new(), Vec::new());
            one.write(&mut first);
            other.write(&mut second);
            // The end of one and the beginning of the other are missing.
            let mut bytes = first[..random.below(first.len() - 1)].to_vec();
            bytes.extend(&second[1 + random.below(second.len() - 1)..]);
            let (torn, mut finder) = (bytes.len(), Finder::default());
            next.write(&mut bytes);
            let mut found = finder.find(&bytes);
            assert_eq!(found.pop(), Some(next), "{torn}");
            // A header that is whole may have another's payload of just its length behind it: never
            // another session or stream.
            for strange in found {
                let whole = (one.session, one.stream, one.kind);
                assert_eq!((strange.session, strange.stream, strange.kind), whole);
            }
        }
    }

    #[test]
    fn nothing_that_comes_is_too_odd_or_kept_without_end() {
        let mut random = Random(13);
        let mut finder = Finder::default();
        for _ in 0..3_000 {
            let n = random.below(20_000);
            let mut bytes = random.bytes(n);
            if random.below(3) == 0 {
                bytes.clear();
                random.frame().write(&mut bytes);
                let at = random.below(bytes.len());
                bytes[at] ^= 1 << random.below(8);
            }
            finder.find(&bytes);
            assert!(finder.kept() <= MOST);
        }
        finder.find(&vec![1; 10 * MOST]);
        assert!(finder.kept() <= MOST);
        // In step again behind it.
        let (mut bytes, frame) = (vec![0], random.frame());
        frame.write(&mut bytes);
        assert_eq!(finder.find(&bytes), [frame]);
    }

    #[test]
    fn the_check_is_the_usual_crc() {
        assert_eq!(crc(b"1234", b"56789"), 0xcbf4_3926);
        assert_eq!(crc(b"123456789", b""), 0xcbf4_3926);
        // Byte by byte it is the same, wherever the eights begin.
        let mut random = Random(17);
        for _ in 0..300 {
            let n = random.below(40);
            let bytes = random.bytes(n);
            let (head, tail) = bytes.split_at(random.below(n + 1));
            let slow = bytes
                .iter()
                .fold(u32::MAX, |crc, byte| (crc >> 8) ^ STEPS[0][(*byte ^ crc as u8) as usize]);
            assert_eq!(crc(head, tail), !slow);
        }
    }

    #[test]
    fn what_is_stuffed_is_what_the_definition_says() {
        // The definition, byte by byte.
        let plain = |from: &[u8]| {
            let mut to = Vec::new();
            for mut run in from.split(|byte| *byte == 0) {
                while run.len() >= 254 {
                    to.push(255);
                    to.extend(&run[..254]);
                    run = &run[254..];
                }
                to.push(run.len() as u8 + 1);
                to.extend(run);
            }
            to
        };
        let mut random = Random(19);
        let ends = [0, 1, 7, 8, 9, 253, 254, 255, 508, 600];
        let runs = ends.into_iter().flat_map(|n| [vec![0; n], vec![1; n], vec![0x80; n]]);
        let odd = (0..500).map(|_| {
            let n = random.below(700);
            random.bytes(n)
        });
        for from in runs.chain(odd.collect::<Vec<_>>()) {
            let (mut stuffed, mut back) = (Vec::new(), Vec::new());
            stuff(&from, &mut stuffed);
            assert!(stuffed == plain(&from), "{from:?}");
            unstuff(&stuffed, &mut back).unwrap();
            assert!(back == from, "{from:?}");
        }
    }
}
