//! Sizes that an Arrow file claims, held against the file before its reader allocates them.

use arrow_ipc::{root_as_footer, root_as_message, Block};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

/// One column's part of one batch, uncompressed.
const MAX_BUFFER_BYTES: i64 = 1 << 30;
const MARK: u64 = 6;
const CONTINUATION: [u8; 4] = [0xff; 4];

struct Source<'a> {
    file: &'a mut File,
    size: u64,
}

impl Source<'_> {
    /// Bytes [at, at + size), which must lie in the file.
    fn bytes(&mut self, at: u64, size: u64) -> Result<Vec<u8>, String> {
        if at.checked_add(size).is_none_or(|end| end > self.size) {
            return Err(format!("{size} bytes at byte {at} run past the end of the file"));
        }
        let mut bytes = vec![0; size as usize];
        let read = self.file.seek(SeekFrom::Start(at)).and_then(|_| self.file.read_exact(&mut bytes));
        read.map_err(|error| format!("reading failed: {error}"))?;
        Ok(bytes)
    }

    /// Checks the message whose description stands at `at`; returns where its body ends.
    fn check_message(&mut self, at: u64, size: u64) -> Result<u64, String> {
        let bytes = self.bytes(at, size)?;
        let message = root_as_message(&bytes).map_err(|error| format!("the message at byte {at}: {error}"))?;
        let body = at + size;
        let end = u64::try_from(message.bodyLength()).ok().and_then(|length| body.checked_add(length));
        let end = end.filter(|&end| end <= self.size).ok_or(format!("the body at byte {body} runs past the end of the file"))?;
        let dictionary = message.header_as_dictionary_batch().and_then(|batch| batch.data());
        let Some(batch) = message.header_as_record_batch().or(dictionary) else { return Ok(end) };
        if let (Some(_), Some(buffers)) = (batch.compression(), batch.buffers()) {
            for buffer in buffers.iter().filter(|buffer| buffer.length() >= 8) {
                let place = u64::try_from(buffer.offset()).ok().and_then(|offset| body.checked_add(offset));
                let length = self.bytes(place.ok_or("a buffer has no place")?, 8)?;
                let length = i64::from_le_bytes(length.try_into().unwrap_or_default());
                if length > MAX_BUFFER_BYTES {
                    return Err(format!("a column of a batch has {length} bytes (at most {MAX_BUFFER_BYTES})"));
                }
            }
        }
        Ok(end)
    }

    fn check_block(&mut self, block: &Block) -> Result<(), String> {
        let part = |value: i64| u64::try_from(value).map_err(|_| "a block has a negative size".to_string());
        let (offset, size, body) = (part(block.offset())?, part(block.metaDataLength().into())?, part(block.bodyLength())?);
        let prefix = if self.bytes(offset, 4)? == CONTINUATION { 8 } else { 4 };
        let end = offset.checked_add(size).and_then(|at| at.checked_add(body));
        if size < prefix || end.is_none_or(|end| end > self.size) {
            return Err(format!("the block at byte {offset} runs past the end of the file"));
        }
        self.check_message(offset + prefix, size - prefix).map(|_| ())
    }
}

fn source(file: &mut File) -> Result<Source<'_>, String> {
    let size = file.metadata().map_err(|error| format!("reading failed: {error}"))?.len();
    Ok(Source { file, size })
}

fn rewound(file: &mut File) -> Result<(), String> {
    file.rewind().map_err(|error| format!("reading failed: {error}"))
}

/// A file that begins with ARROW1: the footer and the blocks that it lists.
pub fn check_file(file: &mut File) -> Result<(), String> {
    let mut source = source(file)?;
    let tail = source.size.checked_sub(MARK + 4).ok_or("it is too short")?;
    let length = source.bytes(tail, 4)?;
    let length = i32::from_le_bytes(length.try_into().unwrap_or_default());
    let start = u64::try_from(length).ok().and_then(|length| tail.checked_sub(length));
    let start = start.ok_or(format!("the footer cannot have {length} bytes; the file is truncated or corrupt"))?;
    let footer = source.bytes(start, tail - start)?;
    let footer = root_as_footer(&footer).map_err(|error| format!("the footer: {error}"))?;
    for block in footer.dictionaries().iter().flatten().chain(footer.recordBatches().iter().flatten()) {
        source.check_block(block)?;
    }
    rewound(file)
}

/// A stream of messages up to its end mark or the end of the file.
pub fn check_stream(file: &mut File) -> Result<(), String> {
    let mut source = source(file)?;
    let mut at = 0;
    while at + 4 <= source.size {
        let mut length = source.bytes(at, 4)?;
        at += 4;
        if length == CONTINUATION {
            length = source.bytes(at, 4)?;
            at += 4;
        }
        let length = i32::from_le_bytes(length.try_into().unwrap_or_default());
        if length == 0 {
            break;
        }
        let size = u64::try_from(length).map_err(|_| "a message has a negative size".to_string())?;
        at = source.check_message(at, size)?;
    }
    rewound(file)
}
