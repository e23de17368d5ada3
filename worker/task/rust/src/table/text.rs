//! CSV (RFC 4180), JSON lists and JSON lines.

use super::{Columns, Rows, BATCH_BYTES, BATCH_ROWS, MAX_ROW_BYTES};
use serde_json::{Map, Value};
use std::io::BufRead;

pub const BOM: &[u8] = b"\xef\xbb\xbf";

fn read_error(error: std::io::Error) -> String {
    format!("reading failed: {error}")
}

fn is_full(out: &str, rows: usize) -> bool {
    rows >= BATCH_ROWS || out.len() >= BATCH_BYTES
}

/// Appends one parsed row with the wanted columns.
fn append_object(value: Value, columns: &Columns, out: &mut String) -> Result<(), String> {
    let Value::Object(mut object) = value else {
        return Err("expected a JSON object".to_string());
    };
    if !columns.0.is_empty() {
        if let Some(missing) = columns.0.iter().find(|name| !object.contains_key(*name)) {
            return Err(format!("field '{missing}' is missing"));
        }
        object.retain(|name, _| columns.0.contains(name));
    }
    out.push_str(&Value::Object(object).to_string());
    out.push('\n');
    Ok(())
}

fn parse_json(bytes: &[u8]) -> Result<Value, String> {
    serde_json::from_slice(bytes).map_err(|error| format!("not valid JSON: {error}"))
}

/// Single bytes with the number of the line that they stand on.
struct Bytes<R> {
    reader: R,
    line: usize,
    peeked: Option<u8>,
}

impl<R: BufRead> Bytes<R> {
    fn new(mut reader: R) -> Result<Self, String> {
        let has_bom = reader.fill_buf().map_err(read_error)?.starts_with(BOM);
        if has_bom {
            reader.consume(BOM.len());
        }
        Ok(Self { reader, line: 1, peeked: None })
    }

    fn next(&mut self) -> Result<Option<u8>, String> {
        if let Some(byte) = self.peeked.take() {
            return Ok(Some(byte));
        }
        let Some(&byte) = self.reader.fill_buf().map_err(read_error)?.first() else { return Ok(None) };
        self.reader.consume(1);
        self.line += usize::from(byte == b'\n');
        Ok(Some(byte))
    }

    fn next_not_blank(&mut self) -> Result<Option<u8>, String> {
        loop {
            match self.next()? {
                Some(byte) if byte.is_ascii_whitespace() => {}
                other => return Ok(other),
            }
        }
    }
}

/// One JSON object a line; blank lines are left out.
pub struct JsonLines<R> {
    reader: R,
    columns: Columns,
    line: usize,
    buffer: Vec<u8>,
}

impl<R: BufRead> JsonLines<R> {
    pub fn new(reader: R, columns: Columns) -> Self {
        Self { reader, columns, line: 0, buffer: Vec::new() }
    }

    /// Whether there was another line; it is in `buffer`.
    fn read_line(&mut self) -> Result<bool, String> {
        self.buffer.clear();
        let mut limited = std::io::Read::take(&mut self.reader, MAX_ROW_BYTES as u64 + 1);
        let size = limited.read_until(b'\n', &mut self.buffer).map_err(read_error)?;
        self.line += 1;
        if size > MAX_ROW_BYTES {
            return Err(format!("line {}: longer than {MAX_ROW_BYTES} bytes", self.line));
        }
        Ok(size > 0)
    }
}

impl<R: BufRead> Rows for JsonLines<R> {
    fn append(&mut self, out: &mut String) -> Result<(), String> {
        let mut rows = 0;
        while !is_full(out, rows) && self.read_line()? {
            let start = if self.line == 1 && self.buffer.starts_with(BOM) { BOM.len() } else { 0 };
            let text = self.buffer[start..].trim_ascii();
            if text.is_empty() {
                continue;
            }
            parse_json(text)
                .and_then(|value| append_object(value, &self.columns, out))
                .map_err(|error| format!("line {}: {error}", self.line))?;
            rows += 1;
        }
        Ok(())
    }
}

/// `[{...}, {...}]`, cut into its objects without holding the whole list.
pub struct JsonList<R> {
    reader: Option<R>,
    bytes: Option<Bytes<R>>,
    columns: Columns,
    row: usize,
    ended: bool,
}

impl<R: BufRead> JsonList<R> {
    pub fn new(reader: R, columns: Columns) -> Self {
        Self { reader: Some(reader), bytes: None, columns, row: 0, ended: false }
    }

    fn bytes(&mut self) -> Result<&mut Bytes<R>, String> {
        if let Some(reader) = self.reader.take() {
            let mut bytes = Bytes::new(reader)?;
            bytes.next_not_blank()?; // the bracket that told the format
            self.bytes = Some(bytes);
        }
        self.bytes.as_mut().ok_or_else(|| "reading failed before".to_string())
    }

    /// The text of the next object; None at the list's end.
    fn next_object(&mut self) -> Result<Option<Vec<u8>>, String> {
        let is_first = self.row == 0;
        let bytes = self.bytes()?;
        let mut byte = bytes.next_not_blank()?;
        if byte == Some(b']') {
            return match bytes.next_not_blank()? {
                None => Ok(None),
                Some(_) => Err(format!("line {}: there is text behind the list", bytes.line)),
            };
        }
        if !is_first {
            if byte != Some(b',') {
                return Err(match byte {
                    None => "the list does not end".to_string(),
                    Some(_) => format!("line {}: expected ',' or ']'", bytes.line),
                });
            }
            byte = bytes.next_not_blank()?;
        }
        match byte {
            Some(b'{') => object_text(bytes).map(Some),
            None => Err("the list does not end".to_string()),
            Some(_) => Err(format!("line {}: expected a JSON object", bytes.line)),
        }
    }
}

/// What follows an opening brace up to the brace that closes it.
fn object_text<R: BufRead>(bytes: &mut Bytes<R>) -> Result<Vec<u8>, String> {
    let (mut text, mut depth, mut in_string, mut escaped) = (vec![b'{'], 1usize, false, false);
    while depth > 0 {
        let byte = bytes.next()?.ok_or("the list ends within an object")?;
        text.push(byte);
        if text.len() > MAX_ROW_BYTES {
            return Err(format!("longer than {MAX_ROW_BYTES} bytes"));
        }
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'{' | b'[' if !in_string => depth += 1,
            b'}' | b']' if !in_string => depth -= 1,
            _ => {}
        }
    }
    Ok(text)
}

impl<R: BufRead> Rows for JsonList<R> {
    fn append(&mut self, out: &mut String) -> Result<(), String> {
        let mut rows = 0;
        while !self.ended && !is_full(out, rows) {
            let object = self.next_object().map_err(|error| format!("row {}: {error}", self.row + 1))?;
            let Some(text) = object else {
                self.ended = true;
                break;
            };
            self.row += 1;
            rows += 1;
            parse_json(&text)
                .and_then(|value| append_object(value, &self.columns, out))
                .map_err(|error| format!("row {}: {error}", self.row))?;
        }
        Ok(())
    }
}

/// RFC 4180 with a header line: every cell is text, an empty line is left out, quotes are doubled within quotes.
pub struct Csv<R> {
    bytes: Bytes<R>,
    names: Vec<String>,
    places: Vec<usize>,
    row: usize,
}

impl<R: BufRead> Csv<R> {
    pub fn new(reader: R, columns: Columns) -> Result<Self, String> {
        let mut csv = Self { bytes: Bytes::new(reader)?, names: Vec::new(), places: Vec::new(), row: 0 };
        csv.names = csv.record()?.ok_or("it is empty; a CSV file begins with a line of column names")?;
        if let Some(place) = csv.names.iter().position(|name| name.is_empty()) {
            return Err(format!("line 1: column {} has no name", place + 1));
        }
        csv.places = columns.places(&csv.names)?;
        Ok(csv)
    }

    /// The cells of the next record that is not an empty line.
    fn record(&mut self) -> Result<Option<Vec<String>>, String> {
        loop {
            let line = self.bytes.line;
            let Some(cells) = self.cells().map_err(|error| format!("line {line}: {error}"))? else { return Ok(None) };
            // A single column may hold an empty cell only in quotes; cells() tells the two apart.
            if !cells.is_empty() {
                return Ok(Some(cells));
            }
        }
    }

    /// None at the end of the file; no cell for an empty line.
    fn cells(&mut self) -> Result<Option<Vec<String>>, String> {
        let mut cells = Vec::new();
        let mut size = 0;
        loop {
            let (cell, quoted, end) = self.cell(&mut size)?;
            let empty = cell.is_empty() && !quoted && cells.is_empty();
            match end {
                None if empty => return Ok(None),
                Some(b'\n') if empty => return Ok(Some(cells)),
                _ => {}
            }
            cells.push(String::from_utf8(cell).map_err(|_| format!("cell {} is not valid UTF-8", cells.len() + 1))?);
            if end != Some(b',') {
                return Ok(Some(cells));
            }
        }
    }

    /// One cell, whether it was in quotes, and what ended it: ',', '\n' or the end of the file.
    fn cell(&mut self, size: &mut usize) -> Result<(Vec<u8>, bool, Option<u8>), String> {
        let mut cell = Vec::new();
        let mut byte = self.bytes.next()?;
        let quoted = byte == Some(b'"');
        if quoted {
            loop {
                match self.bytes.next()? {
                    None => return Err("a quoted cell does not end".to_string()),
                    Some(b'"') => {
                        byte = self.bytes.next()?;
                        if byte != Some(b'"') {
                            break;
                        }
                        cell.push(b'"');
                    }
                    Some(other) => cell.push(other),
                }
                *size += 1;
                if *size > MAX_ROW_BYTES {
                    return Err(format!("longer than {MAX_ROW_BYTES} bytes"));
                }
            }
        }
        loop {
            match byte {
                None | Some(b',') | Some(b'\n') => return Ok((cell, quoted, byte)),
                Some(b'\r') => {
                    let next = self.bytes.next()?;
                    if next.is_none() || next == Some(b'\n') {
                        return Ok((cell, quoted, next));
                    }
                    self.bytes.peeked = next;
                    if quoted {
                        return Err("there is text behind the closing quote of a cell".to_string());
                    }
                    cell.push(b'\r');
                }
                Some(_) if quoted => return Err("there is text behind the closing quote of a cell".to_string()),
                Some(b'"') => return Err("a quote stands within a cell that does not begin with one".to_string()),
                Some(other) => cell.push(other),
            }
            *size += 1;
            if *size > MAX_ROW_BYTES {
                return Err(format!("longer than {MAX_ROW_BYTES} bytes"));
            }
            byte = self.bytes.next()?;
        }
    }
}

impl<R: BufRead> Rows for Csv<R> {
    fn append(&mut self, out: &mut String) -> Result<(), String> {
        let mut rows = 0;
        while !is_full(out, rows) {
            let line = self.bytes.line;
            let Some(mut cells) = self.record()? else { break };
            self.row += 1;
            rows += 1;
            if cells.len() != self.names.len() {
                return Err(format!(
                    "row {} (line {line}): it has {} cells, the header has {}",
                    self.row,
                    cells.len(),
                    self.names.len()
                ));
            }
            let object: Map<String, Value> = self
                .places
                .iter()
                .map(|&place| (self.names[place].clone(), Value::String(std::mem::take(&mut cells[place]))))
                .collect();
            out.push_str(&Value::Object(object).to_string());
            out.push('\n');
        }
        Ok(())
    }
}
