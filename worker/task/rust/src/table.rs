//! Data files as JSON lines, whatever they are: Parquet, Arrow (file or stream), CSV, a JSON list, JSONL. Rows come in batches,
//! so that memory follows the batch and not the file. Every error names the row or the column; the file's name is the caller's.

mod arrow_check;
mod arrow_json;
mod text;

use crate::{guard, store_string, RbString, RbText};
use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::os::raw::c_int;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::Path;

/// Rows of one batch at most; text formats also end a batch when it has this many bytes.
const BATCH_ROWS: usize = 256;
const BATCH_BYTES: usize = 1 << 20;
/// One row of a text format, as it stands in the file.
const MAX_ROW_BYTES: usize = 64 << 20;

/// A source of rows.
trait Rows {
    /// Appends the next rows to `out`, each a JSON object and a line break; nothing when there are no more.
    fn append(&mut self, out: &mut String) -> Result<(), String>;
}

/// The columns that are wanted, in the file's order; empty means all of them.
pub struct Columns(Vec<String>);

impl Columns {
    fn parse(names: &str) -> Self {
        Self(names.split('\n').filter(|name| !name.is_empty()).map(str::to_string).collect())
    }

    /// The places of the wanted columns among `names`. Names must be unique: a JSON object has each once.
    fn places(&self, names: &[String]) -> Result<Vec<usize>, String> {
        for (place, name) in names.iter().enumerate() {
            if names[..place].contains(name) {
                return Err(format!("two columns are named '{name}'"));
            }
        }
        if let Some(missing) = self.0.iter().find(|name| !names.contains(name)) {
            return Err(format!("there is no column '{missing}'; there are {}", names.join(", ")));
        }
        let wanted = |place: &usize| self.0.is_empty() || self.0.contains(&names[*place]);
        Ok((0..names.len()).filter(wanted).collect())
    }
}

pub struct Table {
    rows: Box<dyn Rows>,
}

impl Table {
    fn open(path: &str, columns: Columns) -> Result<Self, String> {
        let mut file = File::open(path).map_err(|error| format!("cannot be opened: {error}"))?;
        let mut head = Vec::new();
        file.by_ref().take(4096).read_to_end(&mut head).map_err(|error| format!("cannot be read: {error}"))?;
        file.rewind().map_err(|error| format!("cannot be read: {error}"))?;
        let extension = Path::new(path).extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default();
        let rows: Box<dyn Rows> = match format_of(&head, &extension)? {
            Format::Parquet => Box::new(arrow_json::parquet(file, columns)?),
            Format::ArrowFile => Box::new(arrow_json::arrow_file(file, columns)?),
            Format::ArrowStream => Box::new(arrow_json::arrow_stream(file, columns)?),
            Format::Csv => Box::new(text::Csv::new(BufReader::new(file), columns)?),
            Format::JsonList => Box::new(text::JsonList::new(BufReader::new(file), columns)),
            Format::JsonLines => Box::new(text::JsonLines::new(BufReader::new(file), columns)),
        };
        Ok(Self { rows })
    }

    fn next(&mut self) -> Result<String, String> {
        let mut out = String::new();
        self.rows.append(&mut out)?;
        Ok(out)
    }
}

enum Format {
    Parquet,
    ArrowFile,
    ArrowStream,
    Csv,
    JsonList,
    JsonLines,
}

/// The content decides where it has a mark; CSV has none, so there the file's name does.
fn format_of(head: &[u8], extension: &str) -> Result<Format, String> {
    if head.starts_with(b"PAR1") {
        return Ok(Format::Parquet);
    }
    if head.starts_with(b"PARE") {
        return Err("it is an encrypted Parquet file; write it without encryption".to_string());
    }
    if head.starts_with(b"ARROW1") {
        return Ok(Format::ArrowFile);
    }
    if head.starts_with(&[0xff; 4]) {
        return Ok(Format::ArrowStream);
    }
    match extension {
        "csv" => return Ok(Format::Csv),
        "parquet" => return Err("it is no Parquet file: it does not begin with 'PAR1'".to_string()),
        "arrow" | "feather" => return Err("it is neither an Arrow file nor an Arrow stream".to_string()),
        _ => {}
    }
    let text = head.strip_prefix(text::BOM).unwrap_or(head);
    match text.iter().find(|byte| !byte.is_ascii_whitespace()) {
        Some(b'[') => Ok(Format::JsonList),
        Some(b'{') | None => Ok(Format::JsonLines),
        Some(_) => Err("its format is not known; .jsonl, .json (a list), .csv, .parquet and .arrow are read".to_string()),
    }
}

/// The readers of Arrow and Parquet panic at some contradictions.
fn caught<T>(body: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|_| Err("it contradicts itself; the file is damaged".to_string()))
}

/// Opens the data file at `path`. `columns`: names separated by line breaks; empty means all.
#[no_mangle]
pub unsafe extern "C" fn RbTableOpen(path: RbText, columns: RbText, out: *mut *mut Table, error: *mut RbString) -> c_int {
    guard(error, || {
        let (path, columns) = (path.as_str()?, Columns::parse(columns.as_str()?));
        let table = caught(|| Table::open(path, columns))?;
        *out = Box::into_raw(Box::new(table));
        Ok(())
    })
}

/// The next rows as JSON lines; empty at the end.
#[no_mangle]
pub unsafe extern "C" fn RbTableNext(table: *mut Table, rows: *mut RbString, error: *mut RbString) -> c_int {
    guard(error, || {
        let text = caught(|| (*table).next())?;
        if !text.is_empty() {
            store_string(rows, text);
        }
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn RbTableFree(table: *mut Table) {
    if !table.is_null() {
        let _ = catch_unwind(AssertUnwindSafe(|| drop(Box::from_raw(table))));
    }
}
