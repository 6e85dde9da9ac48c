//! `guest-image`: makes the initramfs of a guest, and the tree that a disk image is made from.

use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;

/// Makes the image of a microVM guest from the program that runs in it.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The program that becomes /init: static, for the guest's architecture.
    #[arg(long)]
    init: PathBuf,
    /// A module of the kernel that vmm-task loads at boot, not compressed; again for each one, in the
    /// order in which they are loaded. For the kernel of a distribution: ours needs none.
    #[arg(long = "module", value_name = "FILE")]
    modules: Vec<PathBuf>,
    /// Where the initramfs goes (newc cpio, not compressed).
    #[arg(long)]
    initramfs: PathBuf,
    /// An empty or missing directory that gets the same content as files, for mkfs.erofs; needs root.
    #[arg(long)]
    tree: Option<PathBuf>,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let init = guest_image::read_init(&args.init)?;
    let modules = guest_image::read_modules(&args.modules)?;
    let entries = guest_image::entries(&init, &modules);
    let bytes = guest_image::write_initramfs(&entries, &args.initramfs)?;
    println!("guest: {}: {bytes} bytes", args.initramfs.display());
    if let Some(tree) = args.tree {
        guest_image::write_tree(&entries, &tree).context("tree of the disk image")?;
    }
    Ok(())
}
