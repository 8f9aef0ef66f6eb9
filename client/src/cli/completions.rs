//! `espalier completions`: a script that teaches a shell this program's commands and options, from the same definition
//! as the help.

use clap::{Args, Command};
use clap_complete::Shell;

use crate::cli::output::{Failure, Out};

/// Print a shell's completion script.
#[derive(Debug, Args)]
pub(crate) struct Completions {
    /// The shell.
    #[arg(value_enum)]
    shell: Shell,
}

impl Completions {
    pub(crate) fn run(self, mut command: Command, out: Out) -> Result<(), Failure> {
        let mut script = Vec::new();
        let name = command.get_name().to_owned();
        clap_complete::generate(self.shell, &mut command, name, &mut script);
        out.piece(&String::from_utf8_lossy(&script))
    }
}
