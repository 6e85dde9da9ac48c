//! The daemon of gVisor's pods dies at any moment, at rest ([`crate::gvisor`]), under load and at each
//! point of each operation, and nothing is lost or left behind: what is tried of runc's, on gVisor.

use kuasar_tests::on;

use crate::{failpoints, kill9};

const HANDLER: &str = "kuasar-gvisor";

#[test]
fn a_terminal_survives() {
    let Some(_on) = on(HANDLER) else { return };
    kill9::terminal_survives();
}

#[test]
fn killing_it_again_and_again_under_load_loses_no_container() {
    let Some(_on) = on(HANDLER) else { return };
    kill9::killed_again_and_again_under_load();
}

#[test]
fn it_may_die_at_every_failpoint() {
    let Some(_on) = on(HANDLER) else { return };
    failpoints::dies_at_every_failpoint();
}

#[test]
fn a_failure_at_any_point_leaves_nothing() {
    let Some(_on) = on(HANDLER) else { return };
    failpoints::fails_at_any_point();
}
