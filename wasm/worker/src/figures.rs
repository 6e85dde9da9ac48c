//! What instances cost, as docs/performance.md has it. Run with the release profile
//! (`make test-worker`), with `--nocapture` for the figures.

use std::time::{Duration, Instant};

use wasmtime::{Engine, Linker, Module, Store};

use crate::engine::{self, Variant};

/// Instances that are made one after the other.
const ROUNDS: usize = 2000;
/// A goal of the project.
const GOAL: Duration = Duration::from_micros(100);

/// 2 MiB of memory, of which 64 KiB come from the module; a call writes to 16 pages of it.
const MODULE: &str = r#"
  (memory (export "memory") 32)
  (data (i32.const 1024) "DATA")
  (func (export "touch") (result i32)
    (local $at i32)
    (loop $more
      (i32.store (local.get $at) (i32.const 1))
      (local.set $at (i32.add (local.get $at) (i32.const 4096)))
      (br_if $more (i32.lt_u (local.get $at) (i32.const 65536))))
    (i32.load8_u (i32.const 1024)))"#;

fn text() -> String {
    MODULE.replace("DATA", &"x".repeat(64 << 10))
}

fn pool() -> Engine {
    engine::pooled(Variant::default(), 64, 64 << 20).unwrap()
}

/// Prints median and 99th percentile; answers the median.
fn report(what: &str, mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    let at = |share: usize| times[(times.len() - 1) * share / 100];
    println!("{what}: median {:?}, p99 {:?}", at(50), at(99));
    at(50)
}

#[test]
#[cfg_attr(debug_assertions, ignore = "times of code that is not optimised say nothing")]
fn an_instance_from_the_pool_takes_at_most_100_microseconds() {
    let engine = pool();
    let module = Module::new(&engine, wat::parse_str(format!("(module {})", text())).unwrap());
    let module = module.unwrap();
    let pre = Linker::<()>::new(&engine).instantiate_pre(&module).unwrap();
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        let mut store = Store::new(&engine, ());
        let instance = pre.instantiate(&mut store).unwrap();
        times.push(begun.elapsed());
        let touch = instance.get_typed_func::<(), i32>(&mut store, "touch").unwrap();
        // The instance before has written there.
        assert_eq!(touch.call(&mut store, ()).unwrap(), i32::from(b'x'));
    }
    let median = report("a store and an instance of a module, from the pool", times);
    assert!(median <= GOAL, "{median:?}");
}

#[test]
#[cfg_attr(debug_assertions, ignore = "times of code that is not optimised say nothing")]
fn an_instance_of_a_component_from_the_pool_takes_at_most_100_microseconds() {
    let engine = pool();
    let text = format!(
        r#"(component
          (core module $m {})
          (core instance $i (instantiate $m))
          (func (export "touch") (result u32) (canon lift (core func $i "touch"))))"#,
        text()
    );
    let component = wasmtime::component::Component::new(&engine, wat::parse_str(text).unwrap());
    // With everything that a server may import.
    let linker = engine::components(&engine, Variant::default()).unwrap();
    let pre = linker.instantiate_pre(&component.unwrap()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let world = crate::state::World { args: Vec::new(), env: Vec::new(), cwd: "/".to_owned() };
    let (mut times, mut whole) = (Vec::new(), Vec::new());
    runtime.block_on(async {
        for _ in 0..ROUNDS {
            let begun = Instant::now();
            let wasi = world.context().unwrap().build();
            let mut store = Store::new(&engine, crate::state::Component::new(wasi));
            store.limiter(|state| &mut state.limits);
            let made = Instant::now();
            let instance = pre.instantiate_async(&mut store).await.unwrap();
            times.push(made.elapsed());
            whole.push(begun.elapsed());
            let touch = instance.get_typed_func::<(), (u32,)>(&mut store, "touch").unwrap();
            let (got,) = touch.call_async(&mut store, ()).await.unwrap();
            assert_eq!(got, u32::from(b'x'));
        }
    });
    report("the same with a store and its WASI", whole);
    let median = report("an instance of a component, from the pool", times);
    assert!(median <= GOAL, "{median:?}");
}
