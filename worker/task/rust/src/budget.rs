//! What one rendering may use. A template from a model folder is a stranger's program: it must neither hang the task nor
//! take its memory. minijinja counts instructions; here the bytes that instructions make are counted.

use minijinja::{Error, ErrorKind};
use std::cell::Cell;
use std::fmt;
use std::time::{Duration, Instant};

/// Instructions of one rendering: enough for conversations of many thousand messages.
pub const FUEL: u64 = 4_000_000;
/// The longest text that may exist, and the longest result.
pub const MAX_TEXT_BYTES: usize = 16 << 20;
/// The bytes that all texts and lists made on the way may have together.
const MAX_MADE_BYTES: usize = 512 << 20;
const MAX_TIME: Duration = Duration::from_secs(20);
/// Values in a list or mapping, those inside its members included.
const MAX_MEMBERS: usize = 1 << 18;
pub const MAX_DEPTH: usize = 100;

thread_local! {
    static MADE: Cell<usize> = const { Cell::new(0) };
    static STARTED: Cell<Option<Instant>> = const { Cell::new(None) };
    static STRICT: Cell<bool> = const { Cell::new(false) };
}

/// Begins a rendering. strict: writing a variable that is not there is an error.
pub fn start(strict: bool) {
    STRICT.set(strict);
    MADE.set(0);
    STARTED.set(Some(Instant::now()));
}

pub fn refused(what: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("the template makes {what}"))
}

pub fn is_strict() -> bool {
    STRICT.get()
}

/// Counts a text of `bytes` bytes before it is made.
pub fn charge(bytes: usize) -> Result<(), Error> {
    if bytes > MAX_TEXT_BYTES {
        return Err(refused("a text of more than 16 MiB"));
    }
    charge_shared(bytes)
}

/// Counts texts that a list names: no memory, but whatever walks over the list reads them again.
pub fn charge_shared(bytes: usize) -> Result<(), Error> {
    let made = MADE.get().saturating_add(bytes);
    MADE.set(made);
    if made > MAX_MADE_BYTES {
        return Err(refused("more than 512 MiB of text"));
    }
    if STARTED.get().is_some_and(|started| started.elapsed() > MAX_TIME) {
        return Err(refused("no text within 20 seconds"));
    }
    Ok(())
}

/// Counts the members of a container as it is made.
pub fn charge_members(count: usize) -> Result<(), Error> {
    if count > MAX_MEMBERS {
        return Err(refused("a list of more than 262144 members"));
    }
    charge(count * 8)
}

/// A text that stops growing at the bound.
#[derive(Default)]
pub struct BoundedText {
    pub text: String,
    full: bool,
}

impl BoundedText {
    pub fn push(&mut self, part: &str) {
        if self.text.len() + part.len() > MAX_TEXT_BYTES {
            self.full = true;
        }
        if !self.full {
            self.text.push_str(part);
        }
    }

    pub fn push_char(&mut self, letter: char) {
        self.push(letter.encode_utf8(&mut [0; 4]));
    }

    /// Writers stop early on a full text: what would follow is lost anyway.
    pub fn is_full(&self) -> bool {
        self.full
    }

    pub fn finish(self) -> Result<String, Error> {
        charge(if self.full { usize::MAX } else { self.text.len() })?;
        Ok(self.text)
    }
}

impl fmt::Write for BoundedText {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        self.push(part);
        if self.full {
            Err(fmt::Error)
        } else {
            Ok(())
        }
    }
}
