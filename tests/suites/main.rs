//! End-to-end suites on real containerd; `tests/run.sh` brings the bed up and runs them one by one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)] // tests

mod bad_input;
mod checkpoint;
mod ctl;
mod ctl_metrics;
mod docs;
mod engines;
mod events;
mod failpoints;
mod features;
mod gvisor;
mod gvisor_control;
mod gvisor_kill9;
mod gvisor_restore;
mod isulad;
mod isulad_vmm;
mod kill9;
mod lifecycle;
mod own_kernel;
mod privileges;
mod quark;
mod reload;
mod restart;
mod same_words;
mod security;
mod stdio;
mod terminal;
mod traces;
mod vmm;
mod vmm_channels;
mod vmm_noshare;
mod vmm_pool;
mod vmm_q35;
mod volumes;
mod wasm;
mod wire;
