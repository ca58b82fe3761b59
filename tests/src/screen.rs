//! What demos show: claims, each tried before it is called true.

// It is all about what is on screen.
#![allow(clippy::print_stdout)]

use std::io::{IsTerminal, Write};

use anyhow::Result;

/// Shows a claim, tries it, and shows what came of it.
///
/// # Errors
/// What the attempt returns: then the claim is false.
pub fn claim<T>(title: &str, attempt: impl FnOnce() -> Result<(String, T)>) -> Result<T> {
    // While it is being tried, on a terminal; the line is then written over.
    if std::io::stdout().is_terminal() {
        print!("  {} {title}\r", paint("33", "…"));
        // The terminal may be gone; the claim is tried all the same.
        let _ = std::io::stdout().flush();
    }
    match attempt() {
        Ok((said, value)) => {
            println!("  {} {title}", paint("1;32", "✓"));
            println!("      {}", paint("2", &said));
            Ok(value)
        }
        Err(error) => {
            println!("  {} {title}", paint("1;31", "✗"));
            Err(error)
        }
    }
}

/// Bold, on a terminal.
pub fn bold(text: &str) -> String {
    paint("1", text)
}

/// In this colour (SGR parameters), on a terminal.
pub fn paint(code: &str, text: &str) -> String {
    if std::io::stdout().is_terminal() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
}
