//! Stands for libFuzzer's crate where the fuzz targets are compiled by a stable compiler: a target becomes a
//! function, which a test calls.

/// Makes a function `fuzz` of a target.
#[macro_export]
macro_rules! fuzz_target {
    (|$data:ident: &[u8]| $body:block) => {
        /// Takes one input.
        pub fn fuzz($data: &[u8]) $body
    };
}
