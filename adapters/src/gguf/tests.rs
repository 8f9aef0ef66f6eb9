//! Every type round-trips through candle's own writer; every prefix, lie and flipped byte is an error or a value, never a panic.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has failed"
)]

use std::io::Cursor;

use candle_core::quantized::gguf_file::{self, Value as CandleValue};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use proptest::prelude::*;

use super::{Gguf, GgufError};

const TYPES: [GgmlDType; 13] = [
    GgmlDType::F32,
    GgmlDType::F16,
    GgmlDType::BF16,
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
    GgmlDType::Q8_0,
    GgmlDType::Q2K,
    GgmlDType::Q3K,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
];

fn quantized() -> Vec<(String, QTensor)> {
    let dense = Tensor::randn(0f32, 1.0, (3, 512), &Device::Cpu).unwrap();
    TYPES
        .iter()
        .map(|kind| {
            (
                format!("{kind:?}"),
                QTensor::quantize(&dense, *kind).unwrap(),
            )
        })
        .collect()
}

fn written(tensors: &[(String, QTensor)]) -> Vec<u8> {
    let values = [
        (
            "general.architecture",
            CandleValue::String("llama".to_owned()),
        ),
        ("a.count", CandleValue::U32(7)),
        ("a.rate", CandleValue::F32(0.25)),
        ("a.flag", CandleValue::Bool(true)),
        (
            "a.names",
            CandleValue::Array(
                ["x", "yz"]
                    .map(|s| CandleValue::String(s.to_owned()))
                    .to_vec(),
            ),
        ),
        (
            "a.kinds",
            CandleValue::Array(vec![CandleValue::I32(-1), CandleValue::I32(3)]),
        ),
        ("a.scores", CandleValue::Array(vec![CandleValue::F32(-1.5)])),
    ];
    let keys: Vec<_> = values.iter().map(|(key, value)| (*key, value)).collect();
    let borrowed: Vec<_> = tensors
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor))
        .collect();
    let mut out = Cursor::new(Vec::new());
    gguf_file::write(&mut out, &keys, &borrowed).unwrap();
    out.into_inner()
}

fn read(bytes: &[u8]) -> Result<Gguf<Cursor<&[u8]>>, GgufError> {
    Gguf::read("test.gguf", Cursor::new(bytes))
}

/// Reads the header and every tensor.
fn read_all(bytes: &[u8]) -> Result<(), GgufError> {
    let mut gguf = read(bytes)?;
    let names: Vec<_> = gguf.tensors().keys().cloned().collect();
    names
        .iter()
        .try_for_each(|name| gguf.dequantize(name).map(drop))
}

#[test]
fn metadata_comes_back_typed() {
    let bytes = written(&quantized());
    let gguf = read(&bytes).unwrap();
    let metadata = gguf.metadata();
    assert_eq!(
        metadata.text("general.architecture").unwrap(),
        Some("llama")
    );
    assert_eq!(metadata.size("a.count").unwrap(), Some(7));
    assert_eq!(metadata.float("a.rate").unwrap(), Some(0.25));
    assert_eq!(metadata.flag("a.flag").unwrap(), Some(true));
    assert_eq!(
        metadata.texts("a.names").unwrap(),
        Some(&["x".to_owned(), "yz".to_owned()][..])
    );
    assert_eq!(metadata.ints("a.kinds").unwrap(), Some(&[-1, 3][..]));
    assert_eq!(metadata.floats("a.scores").unwrap(), Some(&[-1.5][..]));
    assert_eq!(metadata.size("absent").unwrap(), None);
    let error = metadata.size("a.rate").unwrap_err().to_string();
    assert!(
        error.contains("test.gguf") && error.contains("a.rate") && error.contains("integer"),
        "{error}"
    );
}

/// What is read as stored stands for the same numbers, bit for bit, as candle's widening of it.
#[test]
fn stored_types_stand_for_the_same_numbers() {
    let tensors = quantized();
    let bytes = written(&tensors);
    let mut gguf = read(&bytes).unwrap();
    let mut kinds = Vec::new();
    for (name, _) in &tensors {
        let weight = gguf.weight(name).unwrap();
        let (wide, values) = (weight.widened(), gguf.dequantize(name).unwrap());
        let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&wide), bits(&values), "{name}");
        kinds.push(weight.kind().to_string());
    }
    assert_eq!(
        kinds[..8],
        ["f32", "f16", "bf16", "q4_0", "q4_1", "f32", "f32", "q8_0"]
    );
}

#[test]
fn every_type_widens_as_candle_does() {
    let tensors = quantized();
    let bytes = written(&tensors);
    let mut gguf = read(&bytes).unwrap();
    for (name, tensor) in &tensors {
        let expected: Vec<f32> = tensor
            .dequantize(&Device::Cpu)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1()
            .unwrap();
        assert_eq!(gguf.tensors()[name].shape, [3, 512]);
        assert_eq!(gguf.dequantize(name).unwrap(), expected, "{name}");
    }
}

#[test]
fn chunks_join_at_block_borders() {
    let dense = Tensor::randn(0f32, 1.0, (70, 64 * 256), &Device::Cpu).unwrap();
    let tensors = [(
        "t".to_owned(),
        QTensor::quantize(&dense, GgmlDType::Q4_1).unwrap(),
    )];
    let bytes = written(&tensors);
    let expected: Vec<f32> = tensors[0]
        .1
        .dequantize(&Device::Cpu)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap();
    assert!(expected.len() / 32 > super::tensor::CHUNK_BLOCKS);
    assert_eq!(read(&bytes).unwrap().dequantize("t").unwrap(), expected);
}

#[test]
fn every_prefix_is_refused() {
    let tensors = [("t".to_owned(), quantized().remove(3).1)];
    let bytes = written(&tensors);
    let gguf = read(&bytes).unwrap();
    let end = (gguf.tensors()["t"].start + gguf.tensors()["t"].bytes) as usize;
    for len in 0..end {
        assert!(
            read(&bytes[..len]).is_err(),
            "a prefix of {len} of {end} bytes was read"
        );
    }
    read_all(&bytes[..end]).unwrap();
}

/// A header by hand, so that it can lie.
fn header(tensors: u64, keys: u64, rest: &[u8]) -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend(tensors.to_le_bytes());
    bytes.extend(keys.to_le_bytes());
    bytes.extend(rest);
    bytes
}

fn name(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

fn entry(text: &str, dims: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut bytes = name(text);
    bytes.extend((dims.len() as u32).to_le_bytes());
    dims.iter().for_each(|dim| bytes.extend(dim.to_le_bytes()));
    bytes.extend(kind.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes
}

#[test]
fn lies_are_refused_with_place_and_rule() {
    let huge = u64::MAX.to_le_bytes();
    let array = |kind: u32, count: u64| {
        [
            name("k"),
            9u32.to_le_bytes().into(),
            kind.to_le_bytes().into(),
            count.to_le_bytes().into(),
        ]
        .concat()
    };
    let padded = |entries: &[Vec<u8>]| {
        let mut bytes = header(entries.len() as u64, 0, &entries.concat());
        bytes.resize(bytes.len().next_multiple_of(32) + 64, 0);
        bytes
    };
    let alignment = |value: u32| {
        [
            name("general.alignment"),
            4u32.to_le_bytes().into(),
            value.to_le_bytes().into(),
        ]
        .concat()
    };
    let twice = [
        name("k"),
        0u32.to_le_bytes().into(),
        vec![1],
        name("k"),
        0u32.to_le_bytes().into(),
        vec![1],
    ]
    .concat();
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("magic", b"GGML\x03\0\0\0".to_vec(), "magic"),
        (
            "version",
            [b"GGUF".as_slice(), &1u32.to_le_bytes(), &[0; 16]].concat(),
            "version 1",
        ),
        (
            "endian",
            [b"GGUF".as_slice(), &3u32.to_be_bytes(), &[0; 16]].concat(),
            "big-endian",
        ),
        ("tensor count", header(u64::MAX, 0, &[]), "tensors"),
        ("key count", header(0, 1 << 15, &[]), "do not fit"),
        (
            "key length",
            header(0, 1, &[huge.as_slice(), &[0; 32]].concat()),
            "bytes of a string",
        ),
        (
            "value type",
            header(
                0,
                1,
                &[name("k"), 77u32.to_le_bytes().into(), vec![0; 8]].concat(),
            ),
            "value type 77",
        ),
        (
            "array count",
            header(0, 1, &array(4, u64::MAX)),
            "list elements",
        ),
        (
            "array overflow",
            header(0, 1, &array(10, 1 << 61)),
            "list elements",
        ),
        (
            "nested array",
            header(0, 1, &array(9, 1)),
            "lists within lists",
        ),
        (
            "bool",
            header(
                0,
                1,
                &[name("k"), 7u32.to_le_bytes().into(), vec![2]].concat(),
            ),
            "truth value",
        ),
        ("key twice", header(0, 2, &twice), "twice"),
        (
            "utf-8",
            header(0, 1, &[&1u64.to_le_bytes()[..], &[0xff], &[0; 16]].concat()),
            "UTF-8",
        ),
        ("alignment", header(0, 1, &alignment(24)), "power of two"),
        (
            "no dimension",
            padded(&[entry("t", &[], 0, 0)]),
            "0 dimensions",
        ),
        (
            "many dimensions",
            padded(&[entry("t", &[1; 5], 0, 0)]),
            "5 dimensions",
        ),
        (
            "zero",
            padded(&[entry("t", &[0, 4], 0, 0)]),
            "zero or overflow",
        ),
        (
            "overflow",
            padded(&[entry("t", &[1 << 32, 1 << 32, 4], 0, 0)]),
            "zero or overflow",
        ),
        (
            "byte overflow",
            padded(&[entry("t", &[i64::MAX as u64], 0, 0)]),
            "overflow",
        ),
        ("type", padded(&[entry("t", &[32], 4, 0)]), "type 4"),
        ("block", padded(&[entry("t", &[33], 8, 0)]), "multiple"),
        ("offset", padded(&[entry("t", &[4], 0, 1)]), "alignment"),
        ("end", padded(&[entry("t", &[4], 0, 64)]), "beyond the file"),
        (
            "far end",
            padded(&[entry("t", &[4], 0, u64::MAX - 31)]),
            "beyond the file",
        ),
        (
            "overlap",
            padded(&[entry("t", &[16], 0, 0), entry("u", &[4], 0, 32)]),
            "overlaps",
        ),
        (
            "tensor twice",
            padded(&[entry("t", &[4], 0, 0), entry("t", &[4], 0, 32)]),
            "twice",
        ),
    ];
    for (what, bytes, rule) in cases {
        let error = read(&bytes).expect_err(what).to_string();
        assert!(
            error.starts_with("test.gguf: ") && error.contains(rule),
            "{what}: {error}"
        );
    }
    read(&padded(&[entry("t", &[4], 0, 0), entry("u", &[4], 0, 32)])).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(512) })]
    #[test]
    fn flipped_bytes_never_panic(flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), front in any::<bool>()) {
        static FILE: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
        let mut bytes = FILE.get_or_init(|| written(&quantized())).clone();
        // Most of the file is tensor data, where any byte is fine; half of the cases stay in the header.
        let reach = if front { 700 } else { bytes.len() };
        for (index, value) in flips {
            bytes[index.index(reach)] = value;
        }
        let _ = read_all(&bytes);
    }
}
