//! Parquet and Arrow columns as JSON: text as text, numbers as numbers (what JSON has none for as null), lists as lists, structs
//! and maps with text keys as objects, decimals as text, dates and times as ISO 8601 (instants in UTC, with a 'Z'), binary
//! columns as the text they hold.

use super::{arrow_check, Columns, Rows, BATCH_BYTES, BATCH_ROWS};
use arrow_array::cast::AsArray;
use arrow_array::types::*;
use arrow_array::{Array, RecordBatch};
use arrow_ipc::reader::{FileReader, StreamReader};
use arrow_schema::{ArrowError, DataType, Schema, TimeUnit};
use parquet::arrow::arrow_reader::{ArrowReaderOptions, ParquetRecordBatchReaderBuilder};
use parquet::arrow::ProjectionMask;
use std::fmt::Write;
use std::fs::File;
use std::io::BufReader;

/// Lists in structs in lists ...: deeper than any data set, and far from the end of the stack.
const MAX_DEPTH: usize = 32;

/// Record batches of any source, cut into pieces of at most BATCH_ROWS rows.
pub struct Batches {
    batches: Box<dyn Iterator<Item = Result<RecordBatch, ArrowError>>>,
    current: Option<(RecordBatch, usize)>,
    row: usize,
}

pub fn parquet(file: File, columns: Columns) -> Result<Batches, String> {
    // The schema that Parquet itself states is enough; Arrow's own copy only tells how the writer held the columns in memory.
    let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
    let builder = ParquetRecordBatchReaderBuilder::try_new_with_options(file, options)
        .map_err(|error| format!("damaged Parquet file: {error}"))?;
    let places = checked_places(builder.schema(), &columns)?;
    let mask = ProjectionMask::roots(builder.parquet_schema(), places);
    let reader = builder
        .with_projection(mask)
        .with_batch_size(BATCH_ROWS)
        .build()
        .map_err(|error| format!("damaged Parquet file: {error}"))?;
    Ok(Batches::new(Box::new(reader)))
}

pub fn arrow_file(mut file: File, columns: Columns) -> Result<Batches, String> {
    let damaged = |error: ArrowError| format!("damaged Arrow file: {error}");
    arrow_check::check_file(&mut file).map_err(|error| format!("damaged Arrow file: {error}"))?;
    let reader = FileReader::try_new(BufReader::new(file), None).map_err(damaged)?;
    let places = checked_places(&reader.schema(), &columns)?;
    Ok(Batches::new(Box::new(reader.map(move |batch| batch?.project(&places)))))
}

pub fn arrow_stream(mut file: File, columns: Columns) -> Result<Batches, String> {
    let damaged = |error: ArrowError| format!("damaged Arrow stream: {error}");
    arrow_check::check_stream(&mut file).map_err(|error| format!("damaged Arrow stream: {error}"))?;
    let reader = StreamReader::try_new(BufReader::new(file), None).map_err(damaged)?;
    let places = checked_places(&reader.schema(), &columns)?;
    Ok(Batches::new(Box::new(reader.map(move |batch| batch?.project(&places)))))
}

/// The places of the wanted columns; an error for one that has no JSON form.
fn checked_places(schema: &Schema, columns: &Columns) -> Result<Vec<usize>, String> {
    let names: Vec<String> = schema.fields().iter().map(|field| field.name().clone()).collect();
    let places = columns.places(&names)?;
    for &place in &places {
        let field = schema.field(place);
        check_type(field.data_type(), 0)
            .map_err(|what| format!("column '{}' {what}; name the columns to read without it", field.name()))?;
    }
    Ok(places)
}

fn check_type(data_type: &DataType, depth: usize) -> Result<(), String> {
    use DataType::*;
    if depth > MAX_DEPTH {
        return Err(format!("is nested more than {MAX_DEPTH} times"));
    }
    match data_type {
        Null | Boolean | Int8 | Int16 | Int32 | Int64 | UInt8 | UInt16 | UInt32 | UInt64 => Ok(()),
        Float16 | Float32 | Float64 | Utf8 | LargeUtf8 | Utf8View | Binary | LargeBinary | BinaryView => Ok(()),
        Date32 | Date64 | Time32(_) | Time64(_) | Timestamp(_, _) => Ok(()),
        Decimal32(_, _) | Decimal64(_, _) | Decimal128(_, _) | Decimal256(_, _) => Ok(()),
        List(item) | LargeList(item) | FixedSizeList(item, _) => check_type(item.data_type(), depth + 1),
        Struct(fields) => fields.iter().try_for_each(|field| check_type(field.data_type(), depth + 1)),
        Dictionary(_, value) => check_type(value, depth + 1),
        Map(entries, _) => match entries.data_type() {
            Struct(fields) if fields.len() == 2 && is_text(fields[0].data_type()) => {
                check_type(fields[1].data_type(), depth + 1)
            }
            _ => Err("is a map whose keys are no text".to_string()),
        },
        other => Err(format!("has the type {other}, for which JSON has no form")),
    }
}

fn is_text(data_type: &DataType) -> bool {
    matches!(data_type, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View)
}

impl Batches {
    fn new(batches: Box<dyn Iterator<Item = Result<RecordBatch, ArrowError>>>) -> Self {
        Self { batches, current: None, row: 0 }
    }

    /// The batch with rows left and the first of them; None at the end.
    fn batch(&mut self) -> Result<Option<(RecordBatch, usize)>, String> {
        if let Some((batch, start)) = self.current.take() {
            if start < batch.num_rows() {
                return Ok(Some((batch, start)));
            }
        }
        for batch in self.batches.by_ref() {
            let batch = batch.map_err(|error| format!("damaged behind row {}: {error}", self.row))?;
            if batch.num_rows() > 0 {
                return Ok(Some((batch, 0)));
            }
        }
        Ok(None)
    }
}

impl Rows for Batches {
    fn append(&mut self, out: &mut String) -> Result<(), String> {
        let Some((batch, start)) = self.batch()? else { return Ok(()) };
        let (schema, mut row) = (batch.schema(), start);
        while row < batch.num_rows() && row - start < BATCH_ROWS && out.len() < BATCH_BYTES {
            out.push('{');
            for (place, (field, column)) in schema.fields().iter().zip(batch.columns()).enumerate() {
                if place > 0 {
                    out.push(',');
                }
                write_text(field.name(), out);
                out.push(':');
                write_value(column, row, out)
                    .map_err(|what| format!("row {}: column '{}': {what}", self.row + 1, field.name()))?;
            }
            out.push_str("}\n");
            row += 1;
            self.row += 1;
        }
        self.current = Some((batch, row));
        Ok(())
    }
}

fn write_text(text: &str, out: &mut String) {
    out.push_str(&serde_json::Value::from(text).to_string());
}

fn write_number(value: f64, out: &mut String) {
    out.push_str(&serde_json::Value::from(value).to_string()); // null for NaN and infinities
}

fn write_bytes(bytes: &[u8], out: &mut String) -> Result<(), String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "its bytes are no text (UTF-8)".to_string())?;
    write_text(text, out);
    Ok(())
}

/// Whatever displays itself, as a JSON number or a JSON string.
fn write_shown(value: impl std::fmt::Display, quoted: bool, out: &mut String) {
    let quote = if quoted { "\"" } else { "" };
    let _ = write!(out, "{quote}{value}{quote}");
}

fn write_value(array: &dyn Array, row: usize, out: &mut String) -> Result<(), String> {
    use DataType::*;
    if array.is_null(row) {
        out.push_str("null");
        return Ok(());
    }
    macro_rules! number {
        ($kind:ty) => {
            write_shown(array.as_primitive::<$kind>().value(row), false, out)
        };
    }
    macro_rules! decimal {
        ($kind:ty) => {
            write_shown(array.as_primitive::<$kind>().value_as_string(row), true, out)
        };
    }
    match array.data_type() {
        Null => out.push_str("null"),
        Boolean => write_shown(array.as_boolean().value(row), false, out),
        Int8 => number!(Int8Type),
        Int16 => number!(Int16Type),
        Int32 => number!(Int32Type),
        Int64 => number!(Int64Type),
        UInt8 => number!(UInt8Type),
        UInt16 => number!(UInt16Type),
        UInt32 => number!(UInt32Type),
        UInt64 => number!(UInt64Type),
        Float16 => write_number(array.as_primitive::<Float16Type>().value(row).to_f64(), out),
        Float32 => write_number(f64::from(array.as_primitive::<Float32Type>().value(row)), out),
        Float64 => write_number(array.as_primitive::<Float64Type>().value(row), out),
        Utf8 => write_text(array.as_string::<i32>().value(row), out),
        LargeUtf8 => write_text(array.as_string::<i64>().value(row), out),
        Utf8View => write_text(array.as_string_view().value(row), out),
        Binary => write_bytes(array.as_binary::<i32>().value(row), out)?,
        LargeBinary => write_bytes(array.as_binary::<i64>().value(row), out)?,
        BinaryView => write_bytes(array.as_binary_view().value(row), out)?,
        Decimal32(_, _) => decimal!(Decimal32Type),
        Decimal64(_, _) => decimal!(Decimal64Type),
        Decimal128(_, _) => decimal!(Decimal128Type),
        Decimal256(_, _) => decimal!(Decimal256Type),
        Date32 | Date64 | Time32(_) | Time64(_) | Timestamp(_, _) => write_time(array, row, out)?,
        List(_) => write_list(&array.as_list::<i32>().value(row), out)?,
        LargeList(_) => write_list(&array.as_list::<i64>().value(row), out)?,
        FixedSizeList(_, _) => write_list(&array.as_fixed_size_list().value(row), out)?,
        Struct(fields) => {
            let names = fields.iter().map(|field| field.name().as_str());
            write_object(names.zip(array.as_struct().columns().iter().map(|column| (column.as_ref(), row))), out)?;
        }
        Map(_, _) => {
            let entries = array.as_map().value(row);
            let keys = (0..entries.len()).map(|entry| text_of(entries.column(0), entry));
            let values = (0..entries.len()).map(|entry| (entries.column(1).as_ref(), entry));
            write_object(keys.zip(values), out)?;
        }
        Dictionary(key, _) => write_dictionary(array, key, row, out)?,
        other => return Err(format!("the type {other} has no form in JSON")),
    }
    Ok(())
}

fn text_of(array: &dyn Array, row: usize) -> &str {
    match array.data_type() {
        DataType::Utf8 => array.as_string::<i32>().value(row),
        DataType::LargeUtf8 => array.as_string::<i64>().value(row),
        _ => array.as_string_view().value(row),
    }
}

fn write_list(items: &dyn Array, out: &mut String) -> Result<(), String> {
    out.push('[');
    for item in 0..items.len() {
        if item > 0 {
            out.push(',');
        }
        write_value(items, item, out)?;
    }
    out.push(']');
    Ok(())
}

fn write_object<'a>(
    entries: impl Iterator<Item = (&'a str, (&'a dyn Array, usize))>,
    out: &mut String,
) -> Result<(), String> {
    out.push('{');
    for (place, (name, (array, row))) in entries.enumerate() {
        if place > 0 {
            out.push(',');
        }
        write_text(name, out);
        out.push(':');
        write_value(array, row, out)?;
    }
    out.push('}');
    Ok(())
}

fn write_dictionary(array: &dyn Array, key: &DataType, row: usize, out: &mut String) -> Result<(), String> {
    macro_rules! key_of {
        ($kind:ty) => {
            array.as_dictionary::<$kind>().key(row)
        };
    }
    let place = match key {
        DataType::Int8 => key_of!(Int8Type),
        DataType::Int16 => key_of!(Int16Type),
        DataType::Int32 => key_of!(Int32Type),
        DataType::Int64 => key_of!(Int64Type),
        DataType::UInt8 => key_of!(UInt8Type),
        DataType::UInt16 => key_of!(UInt16Type),
        DataType::UInt32 => key_of!(UInt32Type),
        DataType::UInt64 => key_of!(UInt64Type),
        other => return Err(format!("a dictionary has keys of the type {other}")),
    };
    let values = array.as_any_dictionary().values();
    match place {
        Some(place) if place < values.len() => write_value(values, place, out),
        Some(_) => Err("a dictionary has no such key".to_string()),
        None => {
            out.push_str("null");
            Ok(())
        }
    }
}

/// Dates, times of day and instants as ISO 8601.
fn write_time(array: &dyn Array, row: usize, out: &mut String) -> Result<(), String> {
    macro_rules! show {
        ($kind:ty, $as:ident) => {
            array.as_primitive::<$kind>().$as(row).map(|value| value.to_string())
        };
    }
    let text = match array.data_type() {
        DataType::Date32 => show!(Date32Type, value_as_date),
        DataType::Date64 => show!(Date64Type, value_as_date),
        DataType::Time32(TimeUnit::Second) => show!(Time32SecondType, value_as_time),
        DataType::Time32(_) => show!(Time32MillisecondType, value_as_time),
        DataType::Time64(TimeUnit::Microsecond) => show!(Time64MicrosecondType, value_as_time),
        DataType::Time64(_) => show!(Time64NanosecondType, value_as_time),
        DataType::Timestamp(unit, zone) => {
            let instant = match unit {
                TimeUnit::Second => array.as_primitive::<TimestampSecondType>().value_as_datetime(row),
                TimeUnit::Millisecond => array.as_primitive::<TimestampMillisecondType>().value_as_datetime(row),
                TimeUnit::Microsecond => array.as_primitive::<TimestampMicrosecondType>().value_as_datetime(row),
                TimeUnit::Nanosecond => array.as_primitive::<TimestampNanosecondType>().value_as_datetime(row),
            };
            let mark = if zone.is_some() { "Z" } else { "" };
            // chrono's debug form has the 'T' of ISO 8601.
            instant.map(|value| format!("{value:?}{mark}"))
        }
        _ => None,
    };
    write_shown(text.ok_or("a date or time is out of range")?, true, out);
    Ok(())
}
