//! For tests: numbers that look random and are the same each time.

/// xorshift64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Up to `most` bytes, half of them printable.
    pub fn bytes(&mut self, most: usize) -> Vec<u8> {
        let len = self.next() as usize % (most + 1);
        let byte =
            |r: u64| if r.is_multiple_of(2) { (r >> 8) as u8 } else { 32 + (r >> 8) as u8 % 95 };
        (0..len).map(|_| byte(self.next())).collect()
    }
}
