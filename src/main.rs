//! The binary `hotcell`: hands the command line to the library and turns its answer into an exit code.
//! Nothing is decided here.

fn main() -> std::process::ExitCode {
    hotcell::cli::main(std::env::args_os())
}
