//! The engine's settings, in one place: what is compiled with them is run with them.

use std::hash::{Hash, Hasher};

use wasm_common::wire::Hello;
use wasmtime::component::Linker as ComponentLinker;
use wasmtime::{Config, Engine, Linker, PoolingAllocationConfig};

use crate::code::Pages;
use crate::state::{Component, Module};

/// Version of Wasmtime that this program is built with.
const VERSION: &str = wasmtime_version();

/// Wasmtime says its version nowhere; the workspace pins its line.
const fn wasmtime_version() -> &'static str {
    "48"
}

/// Text of an error with its causes, in one line.
pub fn explain(error: &wasmtime::Error) -> String {
    format!("{error:#}")
}

/// Settings for compiling and running alike. What changes compiled code is part of
/// [`hello`]'s settings by the engine's own account.
fn config() -> Config {
    let mut config = Config::new();
    // Nothing in here unwinds through compiled code, and registering tables costs time per module.
    config.native_unwind_info(false);
    config.wasm_backtrace_details(wasmtime::WasmBacktraceDetails::Disable);
    config.with_custom_code_memory(Some(std::sync::Arc::new(Pages)));
    config
}

/// An engine for one instance in a process of its own.
pub fn single() -> wasmtime::Result<Engine> {
    Engine::new(&config())
}

/// An engine for an instance per request: memory and tables come from a pool, `instances` of them.
pub fn pooled(instances: u32, memory: u64) -> wasmtime::Result<Engine> {
    let mut pool = PoolingAllocationConfig::default();
    pool.total_component_instances(instances)
        .total_core_instances(instances.saturating_mul(4))
        .total_memories(instances.saturating_mul(2))
        .total_tables(instances.saturating_mul(4))
        .total_stacks(instances.saturating_mul(2))
        .max_memories_per_component(2)
        .max_core_instances_per_component(20)
        .max_tables_per_component(20);
    if memory > 0 {
        pool.max_memory_size(usize::try_from(memory.min(4 << 30)).unwrap_or(usize::MAX));
    }
    let mut config = config();
    config.allocation_strategy(pool);
    Engine::new(&config)
}

/// Everything that a container needs and that is the same for all.
pub struct Warm {
    /// Engine for one instance.
    pub engine: Engine,
    /// Descriptor that random numbers come from.
    pub random: Option<i32>,
    /// WASI preview 1.
    pub modules: Linker<Module>,
    /// WASI 0.2, and what `wasi:http` adds.
    pub components: ComponentLinker<Component>,
}

impl Warm {
    /// Sets it up.
    pub fn new() -> wasmtime::Result<Self> {
        let engine = single()?;
        let mut modules = Linker::new(&engine);
        wasmtime_wasi::p1::add_to_linker_async(&mut modules, |state: &mut Module| &mut state.wasi)?;
        let components = components(&engine)?;
        Ok(Self { engine, random: None, modules, components })
    }
}

/// What components may import.
pub fn components(engine: &Engine) -> wasmtime::Result<ComponentLinker<Component>> {
    let mut linker = ComponentLinker::new(engine);
    wasmtime_wasi::p2::add_to_linker_async(&mut linker)?;
    wasmtime_wasi_http::p2::add_only_http_to_linker_async(&mut linker)?;
    Ok(linker)
}

/// What the zygote says first.
pub fn hello() -> Result<Hello, String> {
    let engine = single().map_err(|error| explain(&error))?;
    Ok(hello_of(&engine))
}

/// The same for an engine that there is.
pub fn hello_of(engine: &Engine) -> Hello {
    // Keys of std's default hasher are fixed; the value names files of a cache and nothing else.
    let mut hasher = std::hash::DefaultHasher::new();
    engine.precompile_compatibility_hash().hash(&mut hasher);
    Hello {
        engine: "wasmtime".into(),
        version: VERSION.into(),
        settings: format!("{:016x}", hasher.finish()),
    }
}
