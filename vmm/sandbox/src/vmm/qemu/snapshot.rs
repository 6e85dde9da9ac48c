//! Saving and restoring: QEMU's migration into a file, by descriptor.

use std::path::Path;
use std::sync::Arc;

use super::super::error::Result;
use super::super::spec::VmSpec;
use super::super::{Feature, Vm, Vmm};
use super::Qemu;
use super::machine::Machine;

pub(super) async fn save(machine: &Machine, dir: &Path) -> Result<()> {
    let _ = dir;
    Err(machine.cannot(Feature::Snapshot))
}

pub(super) async fn restore(qemu: &Qemu, spec: &VmSpec, dir: &Path) -> Result<Arc<dyn Vm>> {
    let _ = (spec, dir);
    Err(qemu.cannot(Feature::Snapshot))
}
