"""Makes the table vectors beside this script with pyarrow 24.0.0: Parquet, Arrow, CSV and JSON files, and for each the rows
that pyarrow itself reads back from it, as JSON lines (FILE.expected). Nothing here comes from Refinery's own reader.

  pip install pyarrow==24.0.0 && python3 make_vectors.py
"""
import csv
import datetime
import decimal
import io
import json
import math
import os

import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq

FOLDER = os.path.dirname(os.path.abspath(__file__))
UTC = datetime.timezone.utc


def fraction_of(value):
    """Three or six digits of a second, or none."""
    return "auto" if value.microsecond % 1000 else "milliseconds" if value.microsecond else "seconds"


def text_of(value):
    """The JSON form that docs/formats.md states for what JSON has no type for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, decimal.Decimal):
        return format(value, "f")
    if isinstance(value, datetime.datetime):
        return value.replace(tzinfo=None).isoformat(timespec=fraction_of(value)) + ("Z" if value.tzinfo else "")
    if isinstance(value, datetime.time):
        return value.isoformat(timespec=fraction_of(value))
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {name: text_of(item) for name, item in value.items()}
    if isinstance(value, list):
        return [text_of(item) for item in value]
    return value


def expect(name, rows):
    with open(os.path.join(FOLDER, name + ".expected"), "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(text_of(row), ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n")


def write_parquet(name, table, **options):
    path = os.path.join(FOLDER, name)
    pq.write_table(table, path, **options)
    expect(name, pq.read_table(path).to_pylist(maps_as_pydicts="strict"))


def scalars(arrow):
    """Every type with a JSON form, a null in each column. Parquet has no half-sized or unsigned Arrow dictionary types."""
    moment = datetime.datetime(2024, 2, 29, 23, 59, 58, 123456)
    columns = {
        "nothing": pa.nulls(3),
        "yes": pa.array([True, None, False]),
        "i8": pa.array([-128, None, 127], pa.int8()),
        "i16": pa.array([-32768, None, 32767], pa.int16()),
        "i32": pa.array([-(2**31), None, 2**31 - 1], pa.int32()),
        "i64": pa.array([-(2**63), None, 2**63 - 1], pa.int64()),
        "u8": pa.array([0, None, 255], pa.uint8()),
        "u16": pa.array([0, None, 65535], pa.uint16()),
        "u32": pa.array([0, None, 2**32 - 1], pa.uint32()),
        "u64": pa.array([0, None, 2**64 - 1], pa.uint64()),
        "f16": pa.array([0.5, None, float("nan")], pa.float16()),
        "f32": pa.array([0.1, None, float("inf")], pa.float32()),
        "f64": pa.array([0.1, None, 1e300], pa.float64()),
        "text": pa.array(["zwölf \"☃\" \\ \n\t\x01 \U0001f600", None, ""], pa.string()),
        "large_text": pa.array(["a", None, "b"], pa.large_string()),
        "bytes": pa.array([b"plain", None, b""], pa.binary()),
        "date": pa.array([datetime.date(1969, 12, 31), None, datetime.date(2024, 2, 29)], pa.date32()),
        "time_ms": pa.array([datetime.time(1, 2, 3, 4000), None, datetime.time(23, 59, 59)], pa.time32("ms")),
        "time_us": pa.array([datetime.time(1, 2, 3, 456789), None, datetime.time(0, 0)], pa.time64("us")),
        "instant": pa.array([moment, None, datetime.datetime(1970, 1, 1)], pa.timestamp("us")),
        "instant_utc": pa.array([moment.replace(tzinfo=UTC), None, moment.replace(tzinfo=UTC)], pa.timestamp("us", "UTC")),
        "price": pa.array([decimal.Decimal("-12.30"), None, decimal.Decimal("99999999.99")], pa.decimal128(10, 2)),
        "vast": pa.array([decimal.Decimal("1" * 60), None, decimal.Decimal("-5")], pa.decimal256(70, 0)),
    }
    if arrow:
        columns["view"] = pa.array(["longer than twelve bytes", None, "short"], pa.string_view())
        columns["date64"] = pa.array([datetime.date(1969, 12, 31), None, datetime.date(2024, 2, 29)], pa.date64())
        columns["seconds"] = pa.array([datetime.time(1, 2, 3), None, datetime.time(23, 59, 59)], pa.time32("s"))
    return pa.table(columns)


def nested():
    choices = pa.struct([("text", pa.list_(pa.string())), ("label", pa.list_(pa.string()))])
    deep = pa.list_(pa.struct([("points", pa.list_(pa.list_(pa.int32())))]))
    return pa.table({
        "id": pa.array(["one", "two", "three", "four"]),
        "choices": pa.array([{"text": ["a", "b"], "label": ["A", "B"]}, {"text": [], "label": None}, None,
                             {"text": [None, "ü"], "label": ["1", "2"]}], choices),
        "deep": pa.array([[{"points": [[1, 2], [], None]}], [], None, [None, {"points": None}]], deep),
        "pairs": pa.array([[("a", 1), ("b", None)], [], None, [("c", 3)]], pa.map_(pa.string(), pa.int64())),
        "three": pa.array([[1, 2, 3], [-1, -2, -3], [4, None, 6], [7, 8, 9]], pa.list_(pa.int16(), 3)),
        "many": pa.array([["x"], [], None, ["y", "z"]], pa.large_list(pa.string())),
    })


def dictionaries(null_value):
    """Keys of three widths; null keys, and in Arrow also a null among the values."""
    words = ["agree", None, "disagree", "agree", "neither"] * 40
    return pa.table({
        "word": pa.array(words).dictionary_encode(),
        "small": pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 1, 0] * 40, pa.int8()), ["no", "yes"]),
        "unsigned": pa.DictionaryArray.from_arrays(pa.array([2, 1, 0, 1, None] * 40, pa.uint16()), pa.array([10, null_value, 30])),
    })


def long_texts():
    """300 rows: more than one batch; texts that compress."""
    return pa.table({"row": pa.array(range(300)), "text": pa.array([f"row {i} " + "lorem ipsum " * (i % 20) for i in range(300)])})


def write_arrow(name, table, **options):
    path = os.path.join(FOLDER, name)
    writer = pa.ipc.new_stream if "stream" in name else pa.ipc.new_file
    with writer(path, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as out:
        for batch in table.to_batches(max_chunksize=128):
            out.write_batch(batch)
    with pa.memory_map(path) as source:
        reader = pa.ipc.open_stream(source) if "stream" in name else pa.ipc.open_file(source)
        expect(name, reader.read_all().to_pylist(maps_as_pydicts="strict"))


def write_csv():
    rows = [{"question": "Why, \"then\"?\nSo", "answer": "A", "note": ""}, {"question": " plain ", "answer": "", "note": "é☃"},
            {"question": "", "answer": "\r\n", "note": "\"\""}]
    for name, ending, mark in (("plain.csv", "\n", ""), ("windows.csv", "\r\n", "\ufeff")):
        text = io.StringIO(newline="")
        out = csv.DictWriter(text, list(rows[0]), lineterminator=ending)
        out.writeheader()
        out.writerows(rows)
        path = os.path.join(FOLDER, name)
        with open(path, "w", encoding="utf-8", newline="") as file:
            file.write(mark + text.getvalue())
        options = pa.csv.ConvertOptions(column_types={field: pa.string() for field in rows[0]})
        read = pa.csv.read_csv(path, parse_options=pa.csv.ParseOptions(newlines_in_values=True), convert_options=options)
        assert read.to_pylist(maps_as_pydicts="strict") == rows, read.to_pylist()
        expect(name, read.to_pylist(maps_as_pydicts="strict"))


def write_json():
    rows = [{"a": 1, "b": [1.5, None, "]},{"], "c": {"d": "\\\""}}, {"a": 2 ** 53 + 1, "b": [], "c": {}}, {"a": None, "b": [[]], "c": {"d": "☃"}}]
    with open(os.path.join(FOLDER, "list.json"), "w", encoding="utf-8") as file:
        json.dump(rows, file, indent=2)
    expect("list.json", rows)


write_parquet("scalars.parquet", scalars(False))
write_parquet("nested_snappy.parquet", nested(), compression="snappy")
write_parquet("dictionaries_zstd.parquet", dictionaries(20), compression="zstd", row_group_size=70)
write_parquet("texts_gzip.parquet", long_texts(), compression="gzip", data_page_size=1024)
write_parquet("texts_lz4.parquet", long_texts(), compression="lz4", data_page_version="2.0")
write_parquet("texts_plain_v2.parquet", long_texts().slice(0, 40), compression="none", use_dictionary=False, data_page_version="2.0",
              column_encoding={"row": "DELTA_BINARY_PACKED", "text": "DELTA_BYTE_ARRAY"})
write_parquet("empty.parquet", nested().slice(0, 0))
write_arrow("scalars.arrow", scalars(True))
write_arrow("nested_stream.arrow", nested())
write_arrow("dictionaries_stream.arrow", dictionaries(None))
write_arrow("texts_lz4.arrow", long_texts(), compression="lz4")
write_arrow("texts_zstd_stream.arrow", long_texts(), compression="zstd")
write_csv()
write_json()
