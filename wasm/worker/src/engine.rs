//! The engine's settings, in one place: what is compiled with them is run with them.

use std::hash::{Hash, Hasher};

use kuasar_oci::builtin::workload::Workload;
use wasm_common::kind::{Detected, Kind, detect};
use wasm_common::wire::{Hello, PROTOCOL};
use wasm_process::zygote;
use wasmtime::component::Linker as ComponentLinker;
use wasmtime::{Config, Engine, Linker, PoolingAllocationConfig};

use crate::code::Pages;
use crate::random;
use crate::state::{Component, Module};
use crate::workload::Wasm;
use crate::{interface, wasip3};

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

/// What can be asked of compiled code: that it counts what it does, that it can be interrupted.
/// Either costs time in each loop, so that only those pay who want it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Variant {
    /// Counts fuel.
    pub fuel: bool,
    /// Asks for the epoch.
    pub epoch: bool,
    /// May be of WASI 0.3, and of the component model's functions, streams and futures that wait.
    pub p3: bool,
}

impl Variant {
    /// By [`wasm_common::job::Budget::variant`].
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut variant = Self::default();
        for part in text.split('+') {
            match part {
                "plain" => {}
                "fuel" => variant.fuel = true,
                "epoch" => variant.epoch = true,
                "p3" => variant.p3 = true,
                _ => return Err(format!("{text:.20?} is no variant of compiled code")),
            }
        }
        Ok(variant)
    }
}

/// Settings for compiling and running alike. What changes compiled code is part of
/// [`hello`]'s settings by the engine's own account, but for the variant.
fn config(variant: Variant) -> Config {
    let mut config = Config::new();
    config.consume_fuel(variant.fuel);
    config.epoch_interruption(variant.epoch);
    // Off, an engine is what it would be if there were no WASI 0.3 in this program.
    config.concurrency_support(variant.p3);
    config.wasm_component_model_async(variant.p3);
    // Of modules with threads: see `threads`.
    config.shared_memory(true);
    // Nothing in here unwinds through compiled code, and registering tables costs time per module.
    config.native_unwind_info(false);
    config.wasm_backtrace_details(wasmtime::WasmBacktraceDetails::Disable);
    config.with_custom_code_memory(Some(std::sync::Arc::new(Pages)));
    config
}

/// An engine for one instance in a process of its own.
pub fn single(variant: Variant) -> wasmtime::Result<Engine> {
    Engine::new(&config(variant))
}

/// Code for a module.
///
/// # Errors
/// What is wrong with the module.
pub fn compile(module: &[u8], variant: &str) -> Result<Vec<u8>, String> {
    let variant = Variant::parse(variant)?;
    if !variant.p3 {
        interface::refuse(module)?;
    }
    let engine = single(variant).map_err(|error| explain(&error))?;
    let code = match detect(module) {
        Detected::Wasm(Kind::Module) => engine.precompile_module(module),
        Detected::Wasm(Kind::Component) => engine.precompile_component(module),
        other => return Err(format!("not a module: {other:?}")),
    };
    code.map_err(|error| explain(&error))
}

/// An engine for an instance per request: memory and tables come from a pool, `instances` of them.
pub fn pooled(variant: Variant, instances: u32, memory: u64) -> wasmtime::Result<Engine> {
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
    let mut config = config(variant);
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
    /// WASI 0.2, and what `wasi:http` adds; of code that may be of WASI 0.3, that, too.
    pub components: ComponentLinker<Component>,
}

impl Warm {
    /// Sets it up.
    ///
    /// # Errors
    /// The engine's, in one line.
    pub fn new() -> Result<Self, String> {
        let random = random::open()?;
        let warm = Self::of(Variant::default()).map_err(|error| explain(&error))?;
        Ok(Self { random, ..warm })
    }

    /// The same for code of one variant.
    ///
    /// # Errors
    /// The engine's.
    pub fn of(variant: Variant) -> wasmtime::Result<Self> {
        let engine = single(variant)?;
        let mut modules = Linker::new(&engine);
        wasmtime_wasi::p1::add_to_linker_async(&mut modules, |state: &mut Module| &mut state.wasi)?;
        #[cfg(feature = "wasi-nn")]
        crate::nn::link_modules(&mut modules)?;
        let components = components(&engine, variant)?;
        Ok(Self { engine, random: None, modules, components })
    }
}

impl zygote::Engine for Warm {
    fn hello(&self) -> Hello {
        hello_of(&self.engine)
    }

    fn workload(&'static self) -> Box<dyn Workload> {
        Box::new(Wasm::new(self))
    }
}

/// What components may import.
pub fn components(
    engine: &Engine,
    variant: Variant,
) -> wasmtime::Result<ComponentLinker<Component>> {
    let mut linker = ComponentLinker::new(engine);
    wasmtime_wasi::p2::add_to_linker_async(&mut linker)?;
    wasmtime_wasi_http::p2::add_only_http_to_linker_async(&mut linker)?;
    if variant.p3 {
        wasip3::link(&mut linker)?;
    }
    #[cfg(feature = "wasi-nn")]
    crate::nn::link_components(&mut linker)?;
    Ok(linker)
}

/// What the zygote says first.
pub fn hello() -> Result<Hello, String> {
    let engine = single(Variant::default()).map_err(|error| explain(&error))?;
    Ok(hello_of(&engine))
}

/// The same for an engine that there is.
pub fn hello_of(engine: &Engine) -> Hello {
    // Keys of std's default hasher are fixed; the value names files of a cache and nothing else.
    let mut hasher = std::hash::DefaultHasher::new();
    engine.precompile_compatibility_hash().hash(&mut hasher);
    Hello {
        protocol: PROTOCOL,
        engine: "wasmtime".into(),
        version: VERSION.into(),
        settings: format!("{:016x}", hasher.finish()),
    }
}
