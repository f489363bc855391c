//! The `rodizio` program.

use std::process::ExitCode;

use rodizio::cli::{self, Shell};

/// Training allocates a tensor a step; the system's allocator spends half of such a step in page faults.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    cli::main(&mut Shell::of_process()).into()
}
