//! The decoder on the CUDA operations, in their emulator: what holds on the processor holds there too, in f32 and in 16 bits,
//! and the numbers are the processor's within rounding.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use espalier_adapters::batch::{Covered, Dropout, Pass};
use espalier_adapters::linear::{AdapterGrads, Overlay};
use espalier_adapters::ops::cuda::driver::{
    Address, Arg, DeviceError, DeviceInfo, Driver, Element, Lane, Launch, Recording, VendorProduct,
};
use espalier_adapters::ops::cuda::{CUDA_BLOCK_SIZE, Emulated, build};
use espalier_adapters::ops::{Cpu, Cuda};
use espalier_adapters::pace::Unpaced;

use super::*;
use crate::model::Dtype;

/// Memory of an emulated device that nothing is to be short of.
const ROOMY: usize = 1 << 30;

/// Logits near one, after sums in another order.
const TOLERANCE: f64 = 1e-3;

/// The emulator, watched: how often it recorded and replayed, and whether a lane takes for granted what the other one has not been
/// waited for. The emulator does everything at once, so that nothing else would show it.
#[derive(Debug)]
pub(crate) struct Watched {
    device: Emulated,
    recorded: AtomicUsize,
    replayed: AtomicUsize,
    /// What each lane was given since it was waited for last: where, and how many bytes.
    given: [Mutex<Vec<(Address, usize)>>; 2],
}

/// The kernels for the processor.
fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
        build(&root.join("adapters/kernels"), &root.join("target/kernels")).unwrap()
    })
}

/// Operations on an emulated device with so many bytes of memory, and the device.
pub(crate) fn emulated(element: Element, limit: usize) -> (Backend, Arc<Watched>) {
    let device = Arc::new(Watched {
        device: Emulated::open(library(), limit).unwrap(),
        recorded: AtomicUsize::new(0),
        replayed: AtomicUsize::new(0),
        given: Default::default(),
    });
    let driver: Arc<dyn Driver> = Arc::clone(&device) as _;
    let cuda = Cuda::new(driver, element, true).unwrap();
    (Backend::Cuda(cuda), device)
}

/// A test on a device, and the device.
pub(crate) fn watched(element: Element) -> (Under<Backend>, Arc<Watched>) {
    let (ops, device) = emulated(element, ROOMY);
    let under = Under {
        ops,
        sizes: even,
        block_size: CUDA_BLOCK_SIZE,
        tolerance: TOLERANCE,
    };
    (under, device)
}

pub(crate) fn device(element: Element) -> Under<Backend> {
    watched(element).0
}

/// The processor with a device's sizes, to compare with.
pub(crate) fn beside() -> Under<Backend> {
    Under {
        sizes: even,
        block_size: CUDA_BLOCK_SIZE,
        ..host()
    }
}

/// A small model of sizes that kernels like: widths are multiples of 8, and all but two of them differ (candle derives the size
/// of a head from the width).
pub(crate) fn even(family: Family) -> ModelConfig {
    ModelConfig {
        layers: 2,
        hidden: 64,
        intermediate: 40,
        heads: 4,
        head_dim: 16,
        ..small(family)
    }
}

/// Both elements that are served with, one after the other.
fn each(run: impl Fn(&Under<Backend>)) {
    for element in [Element::F32, Element::Bf16] {
        run(&device(element));
    }
}

// === impl Watched ===

impl Watched {
    pub(crate) fn recorded(&self) -> usize {
        self.recorded.load(Ordering::Relaxed)
    }

    pub(crate) fn replayed(&self) -> usize {
        self.replayed.load(Ordering::Relaxed)
    }

    pub(crate) fn used_bytes(&self) -> usize {
        self.device.info().total_bytes - self.device.free_bytes().unwrap()
    }

    fn given(&self, lane: Lane) -> MutexGuard<'_, Vec<(Address, usize)>> {
        let lane = usize::from(lane == Lane::Side);
        self.given[lane]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails if the other lane may still be bringing what a launch names.
    fn expects(&self, lane: Lane, launch: &Launch<'_>) -> Result<(), DeviceError> {
        let other = if lane == Lane::Main {
            Lane::Side
        } else {
            Lane::Main
        };
        for (at, bytes) in self.given(other).iter() {
            let brought = at.0..at.0 + *bytes as u64;
            let names = |arg: &Arg| matches!(arg, Arg::At(at) if brought.contains(&at.0));
            if let Some(index) = launch.args.iter().position(names) {
                let kernel = launch.kernel;
                let reason = format!("{kernel}: argument {index} is on its way in lane {other:?}");
                return Err(DeviceError::Failed {
                    call: "launch",
                    reason,
                });
            }
        }
        Ok(())
    }
}

impl Driver for Watched {
    fn info(&self) -> &DeviceInfo {
        self.device.info()
    }

    fn free_bytes(&self) -> Result<usize, DeviceError> {
        self.device.free_bytes()
    }

    fn allocate(&self, bytes: usize) -> Result<Address, DeviceError> {
        self.device.allocate(bytes)
    }

    fn free(&self, at: Address, bytes: usize) {
        for lane in [Lane::Main, Lane::Side] {
            let gone = at.0..at.0 + bytes as u64;
            self.given(lane).retain(|(at, _)| !gone.contains(&at.0));
        }
        self.device.free(at, bytes);
    }

    fn upload(&self, lane: Lane, from: &[u8], to: Address) -> Result<(), DeviceError> {
        self.given(lane).push((to, from.len()));
        self.device.upload(lane, from, to)
    }

    fn download(&self, lane: Lane, from: Address, to: &mut [u8]) -> Result<(), DeviceError> {
        self.given(lane).clear();
        self.device.download(lane, from, to)
    }

    fn copy(
        &self,
        lane: Lane,
        from: Address,
        to: Address,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        self.device.copy(lane, from, to, bytes)
    }

    fn zero(&self, lane: Lane, at: Address, bytes: usize) -> Result<(), DeviceError> {
        self.device.zero(lane, at, bytes)
    }

    fn launch(&self, lane: Lane, launch: &Launch<'_>) -> Result<(), DeviceError> {
        self.expects(lane, launch)?;
        self.device.launch(lane, launch)
    }

    fn wait(&self, lane: Lane) -> Result<(), DeviceError> {
        self.given(lane).clear();
        self.device.wait(lane)
    }

    fn record(
        &self,
        run: &mut dyn FnMut() -> Result<(), DeviceError>,
    ) -> Result<Recording, DeviceError> {
        self.recorded.fetch_add(1, Ordering::Relaxed);
        self.device.record(run)
    }

    fn replay(&self, recording: &Recording) -> Result<(), DeviceError> {
        self.replayed.fetch_add(1, Ordering::Relaxed);
        self.device.replay(recording)
    }

    fn product(&self, lane: Lane, product: &VendorProduct) -> Result<bool, DeviceError> {
        self.device.product(lane, product)
    }
}

// === the same tests, elsewhere ===

#[test]
fn every_family_is_candles_there_too() {
    oracle::every_family_is_candles(&device(Element::F32));
}

#[test]
fn windows_hide_what_lies_before_them_there_too() {
    each(oracle::windows_hide_what_lies_before_them);
}

#[test]
fn rows_do_not_know_how_many_there_are_there_either() {
    let rows = equality::rows_do_not_know_how_many_there_are::<Backend>;
    rows(&device(Element::F32), &[Family::Mistral, Family::Qwen3]);
    rows(&device(Element::Bf16), &[Family::Llama, Family::Qwen2]);
}

#[test]
fn a_mixed_batch_is_each_alone_there_too() {
    each(equality::mixed_is_alone);
    equality::mixed_is_alone(&device(Element::F16));
}

#[test]
fn sixteen_bits_serve_as_their_widened_copy_there_too() {
    each(equality::sixteen_bits_are_their_widened_copy);
}

#[test]
fn adapters_and_mixtures_are_merged_weights_there_too() {
    let on = device(Element::F32);
    equality::merged_does_what_the_adapter_does(&on);
    equality::mixtures_are_sums(&on);
}

#[test]
fn a_mixture_is_the_same_alone_and_in_any_batch_there_too() {
    each(equality::mixtures_do_not_know_their_batch);
}

#[test]
fn an_adapter_comes_back_from_there_as_it_went_in() {
    each(equality::adapters_come_back);
}

#[test]
fn no_format_knows_neighbours_there_either() {
    let formats = precision::no_format_knows_neighbours::<Backend>;
    formats(&device(Element::F32), &[Dtype::Bf16, Dtype::Q8]);
    formats(&device(Element::Bf16), &[Dtype::Q8]);
}

// === what only a device can get wrong ===

/// A prompt in pieces and its decoding rows, across the borders of the cache's blocks and of attention's splits, replayed from
/// recordings: the same bits; and beside the processor's.
#[test]
fn a_long_sequence_is_the_same_in_any_pieces_and_near_the_processors() {
    for (element, bound) in [(Element::F32, TOLERANCE), (Element::Bf16, 0.25)] {
        let (on, device) = watched(element);
        let config = even(Family::Llama);
        let (there, here) = (on.model(&config, 1), beside().model(&config, 1));
        let weights = random_adapter(&here, |_, _| true, false, 2);
        let ids = random_ids(&config, 137, 3);
        let states = |on: &Under<Backend>, model: &Model, chunk: usize| {
            let adapters = Some(resident(model, &weights)).into();
            let ids = ids.clone();
            on.states(model, &[Asked { ids, adapters }], chunk)
                .remove(0)
        };
        let whole = states(&on, &there, ids.len());
        assert_eq!(device.recorded(), 0, "a prompt does not recur");
        for chunk in [1, 50] {
            assert_eq!(states(&on, &there, chunk), whole, "in pieces of {chunk}");
        }
        assert!(
            (1..5).contains(&device.recorded()) && device.replayed() > 120,
            "{} recorded, {} replayed",
            device.recorded(),
            device.replayed()
        );
        let off = distance(&whole, &states(&beside(), &here, 50));
        assert!(off < bound, "{element:?} is off by {off}");
    }
}

/// Rows that merged weights answer, rows of an adapter and rows of the base in one batch.
#[test]
fn merged_rows_answer_alike_and_nobody_else_notices() {
    each(|on| {
        let config = even(Family::Qwen2);
        let model = on.model(&config, 1);
        let some = |layer: usize, site| layer == 0 || site != Site::Up;
        let merged = resident(&model, &random_adapter(&model, some, false, 2));
        let other = resident(&model, &random_adapter(&model, |_, _| true, false, 3));
        let overlay = Overlay::build(&merged, &model, || true).unwrap();
        let lens = [9, 5, 20, 7];
        let ids: Vec<_> = (0..4)
            .map(|i| random_ids(&config, lens[i], i as u64))
            .collect();
        let plain: Vec<Mixture> = vec![
            Mixture::default(),
            Some(merged).into(),
            Some(other).into(),
            Mixture::default(),
        ];
        let run = |who: &[usize], covers: bool| {
            let mut kv = KvCache::new(model.ops(), &config, 2 * who.len(), on.block_size);
            let mut workspace = Workspace::new(model.ops());
            let tables: Vec<_> = (0..who.len() as u32).map(|i| [2 * i + 1, 2 * i]).collect();
            let (mut tokens, mut spans, mut runs, mut overlays) =
                (Vec::new(), Vec::new(), Vec::new(), Vec::new());
            for (&who, table) in who.iter().zip(&tables) {
                let rows = tokens.len()..tokens.len() + ids[who].len();
                tokens.extend_from_slice(&ids[who]);
                let covered = covers && who == 1;
                let none = Mixture::default();
                let adapters = if covered { none } else { plain[who].clone() };
                runs.push((rows.len(), adapters));
                if covered {
                    overlays.push(Covered {
                        rows: rows.clone(),
                        overlay: &overlay,
                    });
                }
                spans.push(SeqSpan {
                    rows,
                    start_pos: 0,
                    block_table: table,
                });
            }
            let batch = Batch {
                tokens: &tokens,
                spans: &spans,
                segments: &Segment::join(runs),
                overlays: &overlays,
            };
            let hidden = read(model.ops(), model.forward(&batch, &mut kv, &mut workspace));
            let of = |span: &SeqSpan<'_>| {
                let rows = span.rows.start * config.hidden..span.rows.end * config.hidden;
                hidden[rows].to_vec()
            };
            spans.iter().map(of).collect::<Vec<_>>()
        };
        let (without, with) = (run(&[0, 1, 2, 3], false), run(&[0, 1, 2, 3], true));
        for who in [0, 2, 3] {
            assert_eq!(with[who], without[who], "sequence {who}");
        }
        assert_ne!(with[1], without[1], "was it merged?");
        let bound = if on.ops.working_bytes() == 2 {
            0.1
        } else {
            TOLERANCE
        };
        let off = distance(&with[1], &without[1]);
        assert!(off < bound, "merged is off by {off}");
        assert_eq!(run(&[1], true)[0], with[1], "alone");
        assert_eq!(run(&[3, 1], true)[1], with[1], "beside the base");
    });
}

// === training ===

/// Which training pass.
#[derive(Clone, Copy)]
struct Practice {
    family: Family,
    rate: f32,
    dora: bool,
    inputs_only: bool,
}

/// The states of two packed sequences, one longer than a tile of attention, and the gradients that a given one of the states
/// makes of an adapter's numbers.
fn practised<O: Ops<T = f32>>(on: &Under<O>, practice: Practice) -> [Vec<f32>; 2] {
    let config = (on.sizes)(practice.family);
    let model = on.model(&config, 1);
    let ops = model.ops().apart();
    let weights = random_adapter(&model, |_, _| true, practice.dora, 2);
    let adapter = Arc::new(ResidentAdapter::trainable(&weights, &model).unwrap());
    let sequences = [0..70, 70..81];
    let tokens = random_ids(&config, 81, 3);
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let upstream: Vec<f32> = (0..81 * config.hidden)
        .map(|_| rng.random_range(-1.0..1.0))
        .collect();
    let dropout = (practice.rate > 0.0).then(|| Dropout {
        rate: practice.rate,
        row_keys: (0..81).map(|row| Dropout::row_key(1, 2, 3, row)).collect(),
    });
    let segments = [Segment {
        rows: 0..81,
        adapters: Some(Arc::clone(&adapter)).into(),
    }];
    ops.begin_pass();
    let pass = Pass::new(&ops, config.layers, &segments, &Unpaced).with_dropout(dropout.as_ref());
    let rows = TrainRows {
        tokens: &tokens,
        sequences: &sequences,
    };
    let (mut saved, mut workspace) = (Saved::new(&ops), Workspace::new(&ops));
    saved.lowest = Some(0);
    saved.inputs_only = practice.inputs_only;
    let states = model.forward_train(&pass, rows, &mut saved, &mut workspace);
    let states = read(&ops, states.unwrap());
    let mut grads = vec![Some(AdapterGrads::of(&ops, &adapter))];
    let upstream = written(&ops, &upstream);
    model
        .backward(
            &pass,
            rows,
            &mut saved,
            &upstream,
            &mut grads,
            &mut workspace,
        )
        .unwrap();
    let mut gradient = vec![0.0; adapter.parameter_count()];
    ops.read(grads[0].as_ref().unwrap().all(), &mut gradient);
    [states, gradient]
}

/// The length of what lies between two, as a share of the second's.
fn apart(found: &[f32], exact: &[f32]) -> f64 {
    assert_eq!(found.len(), exact.len());
    let length =
        |numbers: &mut dyn Iterator<Item = f64>| numbers.map(|x| x * x).sum::<f64>().sqrt();
    let pairs = found.iter().zip(exact);
    let between = length(&mut pairs.map(|(f, e)| f64::from(*f) - f64::from(*e)));
    between / length(&mut exact.iter().map(|e| f64::from(*e)))
}

#[test]
fn gradients_are_the_processors_and_running_a_block_again_changes_no_bit() {
    let here: Under<Cpu> = Under {
        sizes: even,
        ..Under::default()
    };
    let rates = [0.0, 0.3, 0.0, 0.3];
    for (family, rate) in FAMILIES.into_iter().zip(rates) {
        let practice = Practice {
            family,
            rate,
            dora: family == Family::Llama,
            inputs_only: false,
        };
        let exact = practised(&here, practice);
        // With DoRA's gains a number is rounded once more on its way back.
        let narrow = if practice.dora { 0.08 } else { 0.05 };
        let elements = [(Element::F32, 1e-5), (Element::Bf16, narrow)];
        let narrow = matches!(family, Family::Llama | Family::Qwen3);
        for (element, bound) in elements.into_iter().take(1 + usize::from(narrow)) {
            let on = device(element);
            let found = practised(&on, practice);
            for (index, what) in ["states", "gradients"].iter().enumerate() {
                let off = apart(&found[index], &exact[index]);
                assert!(
                    off < bound,
                    "{family:?} in {element:?}: {what} are off by {off}"
                );
            }
            if family == Family::Qwen3 {
                let again = Practice {
                    inputs_only: true,
                    ..practice
                };
                assert!(practised(&on, again) == found, "run again in {element:?}");
            }
        }
    }
}

#[test]
fn gains_follow_the_factors_there_too() {
    each(|on| {
        let off = super::dora::gains_off(&on.model(&(on.sizes)(Family::Llama), 1));
        assert!(off < 1e-4, "{off}");
    });
}
