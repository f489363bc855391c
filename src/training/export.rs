//! Weights as a safetensors file, which PyTorch, JAX and others read.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use safetensors::tensor::{Dtype, SafeTensorError, SafeTensors, TensorInfo};
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::Value;

use crate::types::Digest;
use crate::weights::{Layout, TensorSpec, Weights};

/// The one name that the format keeps for itself.
const METADATA: &str = "__metadata__";

/// A counter of whole numbers that PyTorch keeps beside running statistics, and does not need to load them again.
const BATCHES_SEEN: &str = ".num_batches_tracked";

/// The start of names that are no part of a model: what an exported file says of inputs and targets.
const OF_DATA: [&str; 2] = ["input.", "target."];

/// Why weights cannot be written to or read from a safetensors file.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// Cut off, damaged, or another format.
    #[error("this is not a whole safetensors file: {0}")]
    Damaged(#[from] SafeTensorError),
    /// A tensor of another type.
    #[error("tensor {name:?} is of type {dtype}: only F32 can be read")]
    NotF32 {
        /// The tensor.
        name: String,
        /// Its type.
        dtype: String,
    },
    /// A layout whose names a file cannot hold.
    #[error("a file cannot hold a tensor named {0:?}: the name is taken")]
    Name(String),
}

/// The bytes of a safetensors file with `weights` (F32, names, shapes and order as in their layout) and `metadata`.
///
/// The same arguments give the same bytes.
pub fn to_safetensors(weights: &Weights, metadata: &BTreeMap<String, String>) -> Result<Vec<u8>, ExportError> {
    // The crate's own `serialize` orders tensors by name and metadata at random; the format asks for neither.
    let header = Header { metadata, tensors: infos(weights.layout())? };
    let mut header = serde_json::to_vec(&header).map_err(SafeTensorError::from)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut bytes = Vec::with_capacity(8 + header.len() + 4 * weights.values().len());
    bytes.extend((header.len() as u64).to_le_bytes());
    bytes.extend(header);
    bytes.extend(weights.values().iter().flat_map(|value| value.to_le_bytes()));
    Ok(bytes)
}

/// Reads what [`to_safetensors`] or any other program wrote. The layout has the order in which the values stand in
/// the file.
pub fn from_safetensors(bytes: &[u8]) -> Result<(Weights, BTreeMap<String, String>), ExportError> {
    if !ends_inside(bytes) {
        return Err(SafeTensorError::MetadataIncompleteBuffer.into());
    }
    let (_, header) = SafeTensors::read_metadata(bytes)?;
    let file = SafeTensors::deserialize(bytes)?;
    let mut layout = Layout::default();
    let mut values = Vec::with_capacity(header.data_len() / 4);
    for name in header.offset_keys() {
        let tensor = file.tensor(&name)?;
        if name.ends_with(BATCHES_SEEN) {
            continue;
        }
        if tensor.dtype() != Dtype::F32 {
            return Err(ExportError::NotF32 { name, dtype: tensor.dtype().to_string() });
        }
        let (value_bytes, _) = tensor.data().as_chunks::<4>();
        values.extend(value_bytes.iter().map(|&value| f32::from_le_bytes(value)));
        layout.tensors.push(TensorSpec { name, shape: tensor.shape().to_vec() });
    }
    let weights = Weights::new(Arc::new(layout), values).expect("a checked file has every value of its shapes");
    let metadata = header.metadata().iter().flatten().map(|(key, value)| (key.clone(), value.clone()));
    Ok((weights, metadata.collect()))
}

/// The values of `given` in the order of `layout`, by name; what a file says of inputs and targets is left out.
///
/// On failure the first tensor that differs, as each side has it: `layout` first.
pub fn arranged(given: &Weights, layout: &Arc<Layout>) -> Result<Weights, [String; 2]> {
    let mut tensors = of_model(given);
    let describe = |spec: &TensorSpec| format!("{} {:?}", spec.name, spec.shape);
    let none = || "no tensor of that name".to_owned();
    let mut row = Vec::with_capacity(layout.len());
    for spec in &layout.tensors {
        match tensors.remove(spec.name.as_str()) {
            Some((other, values)) if other.shape == spec.shape => row.extend_from_slice(values),
            Some((other, _)) => return Err([describe(spec), describe(other)]),
            None => return Err([describe(spec), none()]),
        }
    }
    match tensors.into_values().next() {
        Some((spec, _)) => Err([none(), describe(spec)]),
        None => Ok(Weights::new(layout.clone(), row).expect("each tensor of the layout gave its values")),
    }
}

/// Names a model, in whatever order its tensors stand.
pub fn digest(given: &Weights) -> Digest {
    let mut all = Vec::new();
    for (name, (spec, values)) in of_model(given) {
        all.extend_from_slice(format!("{name} {:?}\n", spec.shape).as_bytes());
        all.extend_from_slice(bytemuck::cast_slice(values));
    }
    Digest::of(&all)
}

/// The tensors of the model itself, by name.
fn of_model(given: &Weights) -> BTreeMap<&str, (&TensorSpec, &[f32])> {
    let is_of_model = |name: &str| !OF_DATA.iter().any(|start| name.starts_with(start));
    let tensors = given.tensors().filter(|(spec, _)| is_of_model(&spec.name));
    tensors.map(|(spec, values)| (spec.name.as_str(), (spec, values))).collect()
}

/// Whether no tensor claims to end behind the file's end. What is no header at all is left for the crate to explain.
///
/// The crate (0.8.0) adds the last end to the header's length before it compares, which overflows for an absurd end:
/// a panic where overflow is checked.
fn ends_inside(bytes: &[u8]) -> bool {
    let header = bytes.split_first_chunk::<8>().and_then(|(len, rest)| {
        let len = usize::try_from(u64::from_le_bytes(*len)).ok()?;
        serde_json::from_slice(rest.get(..len)?).ok()
    });
    let Some(Value::Object(entries)) = header else { return true };
    let fits = |entry: &Value| entry["data_offsets"][1].as_u64().is_none_or(|end| end <= bytes.len() as u64);
    entries.values().all(fits)
}

/// A safetensors header: one JSON object of the metadata and of each tensor by name.
struct Header<'a> {
    metadata: &'a BTreeMap<String, String>,
    tensors: Vec<(&'a str, TensorInfo)>,
}

impl Serialize for Header<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        if !self.metadata.is_empty() {
            map.serialize_entry(METADATA, self.metadata)?;
        }
        for (name, info) in &self.tensors {
            map.serialize_entry(name, info)?;
        }
        map.end()
    }
}

fn infos(layout: &Layout) -> Result<Vec<(&str, TensorInfo)>, ExportError> {
    let mut names = BTreeSet::from([METADATA]);
    let mut start = 0;
    let infos = layout.tensors.iter().map(|spec| {
        if !names.insert(&spec.name) {
            return Err(ExportError::Name(spec.name.clone()));
        }
        let end = start + 4 * spec.len();
        let info = TensorInfo { dtype: Dtype::F32, shape: spec.shape.clone(), data_offsets: (start, end) };
        start = end;
        Ok((spec.name.as_str(), info))
    });
    infos.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::tensor::TensorView;

    fn weights(tensors: &[(&str, &[usize])]) -> Weights {
        let spec = |&(name, shape): &(&str, &[usize])| TensorSpec { name: name.into(), shape: shape.into() };
        let layout = Layout { tensors: tensors.iter().map(spec).collect() };
        let values = (0..layout.len()).map(|index| index as f32 - 0.25).collect();
        Weights::new(Arc::new(layout), values).unwrap()
    }

    fn model() -> Weights {
        weights(&[("fc2.weight", &[2, 3]), ("fc1.bias", &[3]), ("scale", &[]), ("none", &[0, 4])])
    }

    fn metadata() -> BTreeMap<String, String> {
        (0..20).map(|key| (format!("key {key}"), "a \"quoted\" välue".to_owned())).collect()
    }

    #[test]
    fn weights_and_metadata_survive_the_file_with_their_order() {
        for (weights, metadata) in [(model(), metadata()), (model(), BTreeMap::new()), (weights(&[]), metadata())] {
            let bytes = to_safetensors(&weights, &metadata).unwrap();
            assert_eq!(from_safetensors(&bytes).unwrap(), (weights, metadata));
        }
    }

    #[test]
    fn the_same_weights_give_the_same_bytes() {
        assert_eq!(to_safetensors(&model(), &metadata()).unwrap(), to_safetensors(&model(), &metadata()).unwrap());
    }

    #[test]
    fn the_formats_own_reader_finds_each_tensor_by_name() {
        let bytes = to_safetensors(&model(), &metadata()).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensor = file.tensor("fc1.bias").unwrap();
        assert_eq!((tensor.dtype(), tensor.shape()), (Dtype::F32, &[3][..]));
        assert_eq!(tensor.data(), [5.75f32, 6.75, 7.75].map(f32::to_le_bytes).concat());
    }

    #[test]
    fn a_file_that_is_cut_off_anywhere_is_refused() {
        let bytes = to_safetensors(&model(), &metadata()).unwrap();
        for len in 0..bytes.len() {
            assert!(matches!(from_safetensors(&bytes[..len]), Err(ExportError::Damaged(_))), "{len} bytes were taken");
        }
    }

    #[test]
    fn a_damaged_header_is_refused() {
        let mut bytes = to_safetensors(&model(), &BTreeMap::new()).unwrap();
        bytes[8] = b'!';
        let error = from_safetensors(&bytes).unwrap_err().to_string();
        assert!(error.starts_with("this is not a whole safetensors file: "), "{error}");
    }

    #[test]
    fn a_header_whose_offsets_overflow_is_refused() {
        // Eight of the largest tensors whose bits can be counted, and one that fills the address space.
        let largest = (1u64 << 59) - 1;
        let mut ends: Vec<u64> = (0..9).map(|index| index * 4 * largest).collect();
        ends.push(u64::MAX - 7);
        let entry = |(index, pair): (usize, &[u64])| {
            let (start, end) = (pair[0], pair[1]);
            let shape = (end - start) / 4;
            format!(r#""{index}":{{"dtype":"F32","shape":[{shape}],"data_offsets":[{start},{end}]}}"#)
        };
        let entries: Vec<String> = ends.windows(2).enumerate().map(entry).collect();
        let header = format!("{{{}}}", entries.join(","));
        let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
        assert!(matches!(from_safetensors(&bytes), Err(ExportError::Damaged(_))));
    }

    #[test]
    fn a_tensor_of_another_type_is_refused_by_name() {
        let view = TensorView::new(Dtype::F16, vec![2], &[0; 4]).unwrap();
        let bytes = safetensors::serialize([("fc1.bias", view)], None).unwrap();
        let error = from_safetensors(&bytes).unwrap_err().to_string();
        assert_eq!(error, "tensor \"fc1.bias\" is of type F16: only F32 can be read");
    }

    #[test]
    fn tensors_are_arranged_by_name_and_the_first_that_differs_is_told() {
        let given = weights(&[("b", &[2]), ("input.mean", &[3]), ("a", &[1, 2])]);
        let layout = |tensors| weights(tensors).layout().clone();
        let row = arranged(&given, &layout(&[("a", &[1, 2]), ("b", &[2])])).unwrap();
        assert_eq!(row.values(), [4.75, 5.75, -0.25, 0.75]);
        let told = |tensors| arranged(&given, &layout(tensors)).unwrap_err();
        assert_eq!(told(&[("a", &[2, 1]), ("b", &[2])]), ["a [2, 1]", "a [1, 2]"]);
        assert_eq!(told(&[("a", &[1, 2]), ("c", &[2])]), ["c [2]", "no tensor of that name"]);
        assert_eq!(told(&[("a", &[1, 2])]), ["no tensor of that name", "b [2]"]);
    }

    #[test]
    fn a_name_that_is_taken_is_refused() {
        for tensors in [[("a", &[1][..]), ("a", &[1])], [("a", &[1]), (METADATA, &[1])]] {
            let error = to_safetensors(&weights(&tensors), &BTreeMap::new()).unwrap_err();
            assert!(matches!(error, ExportError::Name(_)), "{error}");
        }
    }
}
