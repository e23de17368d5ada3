//! The C interface declared in bridge.h. Every entry point runs under `guard`, which turns errors and panics into text.

mod budget;
mod chat_template;
mod constraint;
mod table;
mod python_filters;
mod python_methods;
mod python_operators;
mod python_text;
mod text_tokenizer;

use chat_template::ChatTemplate;
use constraint::{Constraint, ConstraintFactory, Kind};
use std::os::raw::{c_char, c_int};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::Once;
use text_tokenizer::TextTokenizer;

#[repr(C)]
pub struct RbText {
    data: *const c_char,
    size: usize,
}

#[repr(C)]
pub struct RbString {
    data: *mut c_char,
    size: usize,
    capacity: usize,
}

#[repr(C)]
pub struct RbIds {
    data: *mut u32,
    size: usize,
    capacity: usize,
}

impl RbText {
    /// The caller promises that `data` points at `size` bytes that live during the call.
    unsafe fn as_str(&self) -> Result<&str, String> {
        if self.size == 0 {
            return Ok("");
        }
        let bytes = std::slice::from_raw_parts(self.data as *const u8, self.size);
        std::str::from_utf8(bytes).map_err(|error| format!("text is not valid UTF-8: {error}"))
    }
}

unsafe fn store_string(out: *mut RbString, text: String) {
    if out.is_null() {
        return;
    }
    let mut bytes = std::mem::ManuallyDrop::new(text.into_bytes());
    (*out).data = bytes.as_mut_ptr() as *mut c_char;
    (*out).size = bytes.len();
    (*out).capacity = bytes.capacity();
}

/// Runs `body`; an error or a panic goes to `error` and gives 1.
unsafe fn guard<F: FnOnce() -> Result<(), String>>(error: *mut RbString, body: F) -> c_int {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| std::panic::set_hook(Box::new(|_| {})));
    let message = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return 0,
        Ok(Err(message)) => message,
        Err(payload) => {
            let text = payload
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| payload.downcast_ref::<&str>().copied())
                .unwrap_or("no message");
            format!("the tokenizer library panicked: {text}")
        }
    };
    store_string(error, one_sentence(&message));
    1
}

/// A message of any crate as one line of valid text: onig's are not always UTF-8, others quote whole files.
fn one_sentence(message: &str) -> String {
    const MAX_LETTERS: usize = 1000;
    let text = String::from_utf8_lossy(message.as_bytes());
    let mut sentence: String = text.chars().take(MAX_LETTERS).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.chars().nth(MAX_LETTERS).is_some() {
        sentence.push_str("...");
    }
    sentence
}

#[no_mangle]
pub unsafe extern "C" fn RbStringFree(string: *mut RbString) {
    if string.is_null() || (*string).data.is_null() {
        return;
    }
    drop(Vec::from_raw_parts((*string).data as *mut u8, (*string).size, (*string).capacity));
    (*string).data = std::ptr::null_mut();
    (*string).size = 0;
    (*string).capacity = 0;
}

#[no_mangle]
pub unsafe extern "C" fn RbIdsFree(ids: *mut RbIds) {
    if ids.is_null() || (*ids).data.is_null() {
        return;
    }
    drop(Vec::from_raw_parts((*ids).data, (*ids).size, (*ids).capacity));
    (*ids).data = std::ptr::null_mut();
    (*ids).size = 0;
    (*ids).capacity = 0;
}

#[no_mangle]
pub unsafe extern "C" fn RbTokenizerNew(json: RbText, out: *mut *mut TextTokenizer, error: *mut RbString) -> c_int {
    guard(error, || {
        *out = Box::into_raw(Box::new(TextTokenizer::from_json(json.as_str()?)?));
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn RbTokenizerFree(tokenizer: *mut TextTokenizer) {
    if !tokenizer.is_null() {
        let _ = catch_unwind(AssertUnwindSafe(|| drop(Box::from_raw(tokenizer))));
    }
}

#[no_mangle]
pub unsafe extern "C" fn RbTokenizerSetBosEos(
    tokenizer: *mut TextTokenizer,
    bos: RbText,
    eos: RbText,
    error: *mut RbString,
) -> c_int {
    guard(error, || (*tokenizer).set_bos_eos(bos.as_str()?, eos.as_str()?))
}

#[no_mangle]
pub unsafe extern "C" fn RbTokenizerEncode(
    tokenizer: *const TextTokenizer,
    text: RbText,
    add_special_tokens: bool,
    out: *mut RbIds,
    error: *mut RbString,
) -> c_int {
    guard(error, || {
        let ids = (*tokenizer).encode(text.as_str()?, add_special_tokens)?;
        let mut ids = std::mem::ManuallyDrop::new(ids);
        (*out).data = ids.as_mut_ptr();
        (*out).size = ids.len();
        (*out).capacity = ids.capacity();
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn RbTokenizerDecode(
    tokenizer: *const TextTokenizer,
    ids: *const u32,
    count: usize,
    skip_special_tokens: bool,
    out: *mut RbString,
    error: *mut RbString,
) -> c_int {
    guard(error, || {
        let ids = if count == 0 { &[][..] } else { std::slice::from_raw_parts(ids, count) };
        store_string(out, (*tokenizer).decode(ids, skip_special_tokens)?);
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn RbTokenizerVocabSize(tokenizer: *const TextTokenizer) -> usize {
    catch_unwind(AssertUnwindSafe(|| (*tokenizer).vocab_size())).unwrap_or(0)
}

#[no_mangle]
pub unsafe extern "C" fn RbTokenizerTokenToId(tokenizer: *const TextTokenizer, token: RbText) -> i64 {
    catch_unwind(AssertUnwindSafe(|| match token.as_str() {
        Ok(token) => (*tokenizer).token_to_id(token).map_or(-1, i64::from),
        Err(_) => -1,
    }))
    .unwrap_or(-1)
}

#[no_mangle]
pub unsafe extern "C" fn RbTemplateNew(source: RbText, out: *mut *mut ChatTemplate, error: *mut RbString) -> c_int {
    guard(error, || {
        *out = Box::into_raw(Box::new(ChatTemplate::compile(source.as_str()?)?));
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn RbTemplateNewPlain(source: RbText, out: *mut *mut ChatTemplate, error: *mut RbString) -> c_int {
    guard(error, || {
        *out = Box::into_raw(Box::new(ChatTemplate::compile_plain(source.as_str()?)?));
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn RbTemplateFree(chat_template: *mut ChatTemplate) {
    if !chat_template.is_null() {
        let _ = catch_unwind(AssertUnwindSafe(|| drop(Box::from_raw(chat_template))));
    }
}

#[no_mangle]
pub unsafe extern "C" fn RbTemplateRender(
    chat_template: *const ChatTemplate,
    context_json: RbText,
    now_seconds: i64,
    out: *mut RbString,
    error: *mut RbString,
) -> c_int {
    guard(error, || {
        store_string(out, (*chat_template).render(context_json.as_str()?, now_seconds)?);
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn RbConstraintFactoryNew(
    tokenizer: *const TextTokenizer,
    end_ids: *const u32,
    end_count: usize,
    vocab_size: usize,
    out: *mut *mut ConstraintFactory,
    error: *mut RbString,
) -> c_int {
    guard(error, || {
        let end_ids = if end_count == 0 { &[][..] } else { std::slice::from_raw_parts(end_ids, end_count) };
        *out = Box::into_raw(Box::new(ConstraintFactory::new(&*tokenizer, end_ids, vocab_size)?));
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn RbConstraintFactoryFree(factory: *mut ConstraintFactory) {
    if !factory.is_null() {
        let _ = catch_unwind(AssertUnwindSafe(|| drop(Box::from_raw(factory))));
    }
}

#[no_mangle]
pub unsafe extern "C" fn RbConstraintFactoryVocabSize(factory: *const ConstraintFactory) -> usize {
    catch_unwind(AssertUnwindSafe(|| (*factory).vocab_size())).unwrap_or(0)
}

#[no_mangle]
pub unsafe extern "C" fn RbConstraintNew(
    factory: *const ConstraintFactory,
    kind: c_int,
    source: RbText,
    out: *mut *mut Constraint,
    error: *mut RbString,
) -> c_int {
    guard(error, || {
        let kind = match kind {
            0 => Kind::JsonSchema,
            1 => Kind::Regex,
            2 => Kind::Lark,
            other => return Err(format!("no kind of constraint {other}")),
        };
        *out = Box::into_raw(Box::new((*factory).constraint(kind, source.as_str()?)?));
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn RbConstraintFree(constraint: *mut Constraint) {
    if !constraint.is_null() {
        let _ = catch_unwind(AssertUnwindSafe(|| drop(Box::from_raw(constraint))));
    }
}

#[no_mangle]
pub unsafe extern "C" fn RbConstraintMask(
    constraint: *mut Constraint,
    words: *mut u32,
    word_count: usize,
    error: *mut RbString,
) -> c_int {
    guard(error, || {
        let words = if word_count == 0 { &mut [][..] } else { std::slice::from_raw_parts_mut(words, word_count) };
        (*constraint).mask(words)
    })
}

#[no_mangle]
pub unsafe extern "C" fn RbConstraintAccept(constraint: *mut Constraint, token: u32, error: *mut RbString) -> c_int {
    guard(error, || (*constraint).accept(token))
}

#[no_mangle]
pub unsafe extern "C" fn RbConstraintFinished(constraint: *const Constraint) -> bool {
    catch_unwind(AssertUnwindSafe(|| (*constraint).finished())).unwrap_or(true)
}

#[no_mangle]
pub unsafe extern "C" fn RbConstraintCanStop(constraint: *mut Constraint) -> bool {
    catch_unwind(AssertUnwindSafe(|| (*constraint).can_stop())).unwrap_or(false)
}
