//! What every device keeps: one list of checks, run on each device there is.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::driver::{
    Address, Arg, DeviceError, Driver, Element, Lane, Launch, ProductKind, VendorProduct,
};

const LANES: [Lane; 2] = [Lane::Main, Lane::Side];

/// A launch of an elementwise kernel, which takes 2048 numbers a block.
pub(super) struct Kernel {
    name: &'static str,
    grid: [u32; 3],
    args: Vec<Arg>,
}

impl Kernel {
    pub(super) fn new(name: &'static str, count: usize, args: &[Arg]) -> Self {
        let blocks = u32::try_from(count.div_ceil(2048)).unwrap();
        Kernel {
            name,
            grid: [blocks, 1, 1],
            args: args.to_vec(),
        }
    }

    pub(super) fn launch(&self) -> Launch<'_> {
        Launch {
            kernel: self.name,
            grid: self.grid,
            block: 256,
            shared: 0,
            args: &self.args,
        }
    }
}

/// Every check.
pub(super) fn all(driver: &dyn Driver) {
    bytes_come_back_as_they_went(driver);
    uploads_may_be_reused_at_once(driver);
    nothing_is_at_no_address(driver);
    kernels_compute(driver);
    arguments_are_counted_and_measured(driver);
    a_recording_freezes_arguments_and_not_memory(driver);
    what_needs_an_answer_is_not_recorded(driver);
    others_go_on_while_one_records(driver);
    a_run_that_fails_leaves_no_recording(driver);
    memory_is_freed_behind_its_last_use(driver);
    memory_that_was_freed_is_there_again(driver);
    a_full_device_says_so_and_goes_on(driver);
    threads_have_their_own_lanes(driver);
    products_are_those_of_loops(driver);
}

/// Numbers on the device.
struct Numbers<'a> {
    driver: &'a dyn Driver,
    at: Address,
    count: usize,
}

impl<'a> Numbers<'a> {
    fn new(driver: &'a dyn Driver, numbers: &[f32]) -> Self {
        let new = Numbers {
            driver,
            at: driver.allocate(numbers.len() * 4).unwrap(),
            count: numbers.len(),
        };
        new.set(Lane::Main, numbers);
        new
    }

    fn set(&self, lane: Lane, numbers: &[f32]) {
        let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_ne_bytes()).collect();
        self.driver.upload(lane, &bytes, self.at).unwrap();
    }

    fn get(&self, lane: Lane) -> Vec<f32> {
        let mut bytes = vec![0; self.count * 4];
        self.driver.download(lane, self.at, &mut bytes).unwrap();
        let numbers = bytes.as_chunks().0.iter().copied();
        numbers.map(f32::from_ne_bytes).collect()
    }

    /// `self += x`.
    fn add(&self, lane: Lane, x: &Numbers<'_>) -> Result<(), DeviceError> {
        let args = [
            Arg::At(x.at),
            Arg::At(self.at),
            Arg::Long(self.count as i64),
        ];
        self.driver
            .launch(lane, &Kernel::new("add_f32", self.count, &args).launch())
    }
}

impl Drop for Numbers<'_> {
    fn drop(&mut self) {
        self.driver.free(self.at, self.count * 4);
    }
}

/// Bytes that look like nothing.
fn noise(count: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 56) as u8
    };
    (0..count).map(|_| next()).collect()
}

fn bytes_come_back_as_they_went(driver: &dyn Driver) {
    for (index, lane) in LANES.into_iter().enumerate() {
        for count in [1, 63, 4096, (1 << 20) + 1, (9 << 20) + 5] {
            let from = noise(count, (index + count) as u64);
            let (a, b) = (
                driver.allocate(count).unwrap(),
                driver.allocate(count).unwrap(),
            );
            assert_eq!([a.0 % 256, b.0 % 256], [0, 0]);
            driver.upload(lane, &from, a).unwrap();
            driver.copy(lane, a, b, count).unwrap();
            driver.zero(lane, a, count).unwrap();
            let (mut zeroes, mut back) = (vec![1; count], vec![0; count]);
            driver.download(lane, b, &mut back).unwrap();
            driver.download(lane, a, &mut zeroes).unwrap();
            assert!(
                back == from && zeroes.iter().all(|byte| *byte == 0),
                "{count} bytes"
            );
            driver.free(a, count);
            driver.free(b, count);
        }
    }
}

/// More small uploads than the ring holds, all from one place.
fn uploads_may_be_reused_at_once(driver: &dyn Driver) {
    const EACH: usize = 1000;
    let all = noise(20 * 1024 * EACH, 7);
    let at = driver.allocate(all.len()).unwrap();
    let mut from = [0; EACH];
    for (index, bytes) in all.chunks(EACH).enumerate() {
        from.copy_from_slice(bytes);
        driver
            .upload(Lane::Main, &from, at.plus(index * EACH))
            .unwrap();
    }
    let mut back = vec![0; all.len()];
    driver.download(Lane::Main, at, &mut back).unwrap();
    assert!(back == all);
    driver.free(at, all.len());
}

fn nothing_is_at_no_address(driver: &dyn Driver) {
    let at = driver.allocate(0).unwrap();
    assert_eq!(at, Address::NULL);
    driver.upload(Lane::Main, &[], at).unwrap();
    driver.copy(Lane::Main, at, at, 0).unwrap();
    driver.zero(Lane::Main, at, 0).unwrap();
    driver.download(Lane::Main, at, &mut []).unwrap();
    driver.free(at, 0);
}

fn kernels_compute(driver: &dyn Driver) {
    for lane in LANES {
        let count = 5000;
        let x: Vec<f32> = (0..count).map(|i| i as f32).collect();
        let (x, y) = (
            Numbers::new(driver, &x),
            Numbers::new(driver, &vec![0.5; count]),
        );
        driver.wait(Lane::Main).unwrap();
        y.add(lane, &x).unwrap();
        y.add(lane, &x).unwrap();
        let expected = (0..count).map(|i| 2.0 * i as f32 + 0.5);
        assert!(y.get(lane).into_iter().eq(expected));
    }
}

fn arguments_are_counted_and_measured(driver: &dyn Driver) {
    let x = Numbers::new(driver, &[0.0; 8]);
    let (at, long) = (Arg::At(x.at), Arg::Long(8));
    let launch = |name, args: &[Arg]| {
        let kernel = Kernel::new(name, 8, args);
        driver.launch(Lane::Main, &kernel.launch()).unwrap_err()
    };
    let unknown = launch("add_f64", &[at, at, long]);
    assert!(matches!(&unknown, DeviceError::NoKernel { name } if name == "add_f64"));
    let few = launch("add_f32", &[at, at]).to_string();
    assert!(
        few.contains("takes 3 arguments, not 2") && few.contains("add_f32"),
        "{few}"
    );
    let narrow = launch("add_f32", &[at, at, Arg::Int(8)]).to_string();
    assert!(narrow.contains("argument 2 has 8 bytes"), "{narrow}");
    let many = launch("add_f32", &[at; 40]).to_string();
    assert!(many.contains("40"), "{many}");
    driver.wait(Lane::Main).unwrap();
}

fn a_recording_freezes_arguments_and_not_memory(driver: &dyn Driver) {
    let (x, y) = (
        Numbers::new(driver, &[1.0; 16]),
        Numbers::new(driver, &[0.0; 16]),
    );
    let kept = Numbers::new(driver, &[0.0; 16]);
    let mut count = 16;
    y.add(Lane::Main, &x).unwrap();
    let recording = driver.record(&mut || {
        driver.zero(Lane::Main, y.at, 32)?;
        let args = [Arg::At(x.at), Arg::At(y.at), Arg::Long(count)];
        driver.launch(Lane::Main, &Kernel::new("add_f32", 16, &args).launch())?;
        driver.copy(Lane::Main, y.at, kept.at, 64)
    });
    let recording = recording.unwrap();
    // Nothing of it was done, and neither this change nor that of the host's number below reaches it.
    assert_eq!(y.get(Lane::Main), [1.0; 16]);
    count -= 8;
    assert_eq!(count, 8);
    let mut second = 1.0;
    for replayed in 1..=3 {
        x.set(Lane::Main, &[replayed as f32; 16]);
        driver.replay(&recording).unwrap();
        second += replayed as f32;
        let found = kept.get(Lane::Main);
        assert_eq!(found[..8], [replayed as f32; 8]);
        assert_eq!(found[8..], [second; 8]);
    }
    // Several in flight.
    x.set(Lane::Main, &[1.0; 16]);
    for _ in 0..10 {
        driver.replay(&recording).unwrap();
    }
    drop(recording);
    assert_eq!(kept.get(Lane::Main)[8..], [second + 10.0; 8]);
    let empty = driver.record(&mut || Ok(())).unwrap();
    driver.replay(&empty).unwrap();
    driver.wait(Lane::Main).unwrap();
}

fn what_needs_an_answer_is_not_recorded(driver: &dyn Driver) {
    let x = Numbers::new(driver, &[1.0; 16]);
    let earlier = driver.record(&mut || Ok(())).unwrap();
    let recording = driver.record(&mut || {
        assert!(driver.upload(Lane::Main, &[0; 4], x.at).is_err());
        assert!(driver.download(Lane::Main, x.at, &mut [0; 4]).is_err());
        assert!(driver.wait(Lane::Main).is_err());
        assert!(driver.allocate(64).is_err());
        assert!(driver.replay(&earlier).is_err());
        assert!(driver.record(&mut || Ok(())).is_err());
        driver.zero(Lane::Main, x.at, 32)
    });
    driver.replay(&recording.unwrap()).unwrap();
    assert_eq!(x.get(Lane::Main)[7..9], [0.0, 1.0]);
}

fn others_go_on_while_one_records(driver: &dyn Driver) {
    let (x, y) = (
        Numbers::new(driver, &[1.0; 16]),
        Numbers::new(driver, &[0.0; 16]),
    );
    let freed = driver.allocate(64).unwrap();
    let elsewhere = || {
        let arrived = Numbers {
            driver,
            at: driver.allocate(64).unwrap(),
            count: 16,
        };
        arrived.set(Lane::Side, &[3.0; 16]);
        arrived.add(Lane::Side, &arrived).unwrap();
        assert_eq!(arrived.get(Lane::Side), [6.0; 16]);
        assert!(driver.zero(Lane::Main, arrived.at, 64).is_err());
    };
    let recording = driver.record(&mut || {
        y.add(Lane::Main, &x)?;
        std::thread::scope(|scope| scope.spawn(elsewhere).join().unwrap());
        driver.free(freed, 64);
        y.add(Lane::Main, &x)
    });
    driver.replay(&recording.unwrap()).unwrap();
    assert_eq!(y.get(Lane::Main), [2.0; 16]);
}

fn a_run_that_fails_leaves_no_recording(driver: &dyn Driver) {
    let (x, y) = (
        Numbers::new(driver, &[1.0; 16]),
        Numbers::new(driver, &[0.0; 16]),
    );
    let failed = driver.record(&mut || {
        y.add(Lane::Main, &x)?;
        Err(DeviceError::NoKernels)
    });
    assert_eq!(failed.unwrap_err(), DeviceError::NoKernels);
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        driver.record(&mut || {
            y.add(Lane::Main, &x).unwrap();
            std::panic::resume_unwind(Box::new("as meant"))
        })
    }));
    assert!(panicked.is_err());
    y.add(Lane::Main, &x).unwrap();
    assert_eq!(y.get(Lane::Main), [1.0; 16]);
    let recording = driver.record(&mut || y.add(Lane::Main, &x)).unwrap();
    driver.replay(&recording).unwrap();
    assert_eq!(y.get(Lane::Main), [2.0; 16]);
}

/// Memory is given back while the main lane has yet to read it, and another takes its place.
fn memory_is_freed_behind_its_last_use(driver: &dyn Driver) {
    let y = Numbers::new(driver, &[0.0; 4096]);
    for round in 1..=8 {
        let x = Numbers::new(driver, &[1.0; 4096]);
        y.add(Lane::Main, &x).unwrap();
        drop(x);
        let other = driver.allocate(4096 * 4).unwrap();
        driver.upload(Lane::Side, &[0x55; 4096 * 4], other).unwrap();
        driver.wait(Lane::Side).unwrap();
        if round % 4 == 0 {
            assert_eq!(y.get(Lane::Main), [round as f32; 4096]);
        }
        driver.free(other, 4096 * 4);
    }
}

fn memory_that_was_freed_is_there_again(driver: &dyn Driver) {
    driver.wait(Lane::Main).unwrap();
    driver.wait(Lane::Side).unwrap();
    let half = driver.free_bytes().unwrap() / 2;
    for _ in 0..10 {
        let at = driver.allocate(half).unwrap();
        driver.zero(Lane::Main, at, 4096).unwrap();
        driver.free(at, half);
    }
}

fn a_full_device_says_so_and_goes_on(driver: &dyn Driver) {
    let asked = driver.info().total_bytes * 2;
    match driver.allocate(asked) {
        Err(DeviceError::OutOfMemory { asked: said, free }) => {
            assert_eq!(said, asked);
            assert!(free > 0 && free <= driver.info().total_bytes, "{free}");
        }
        other => panic!("{other:?}"),
    }
    let x = Numbers::new(driver, &[1.0; 16]);
    assert_eq!(x.get(Lane::Main), [1.0; 16]);
}

fn threads_have_their_own_lanes(driver: &dyn Driver) {
    let work = |lane: Lane| {
        for round in 0..50 {
            let (x, y) = (
                driver.allocate(4000).unwrap(),
                driver.allocate(4000).unwrap(),
            );
            let from = noise(4000, round + lane as u64 * 1000);
            driver.upload(lane, &from, x).unwrap();
            driver.copy(lane, x, y, 4000).unwrap();
            let mut back = vec![0; 4000];
            driver.download(lane, y, &mut back).unwrap();
            assert!(back == from);
            driver.free(x, 4000);
            driver.free(y, 4000);
        }
    };
    std::thread::scope(|scope| {
        for lane in LANES {
            scope.spawn(move || work(lane));
        }
    });
}

fn products_are_those_of_loops(driver: &dyn Driver) {
    let (rows, inputs, outputs) = (3, 5, 4);
    let number = |i: usize| (i * 7 % 11) as f32 - 5.0;
    let matrix = |count: usize| -> Vec<f32> { (0..count).map(number).collect() };
    for kind in [ProductKind::Forward, ProductKind::Backward] {
        let (from, to) = match kind {
            ProductKind::Forward => (inputs, outputs),
            ProductKind::Backward => (outputs, inputs),
        };
        let (x, w) = (matrix(rows * from), matrix(outputs * inputs));
        let term = |row: usize, column: usize, k: usize| match kind {
            ProductKind::Forward => x[row * from + k] * w[column * inputs + k],
            ProductKind::Backward => x[row * from + k] * w[k * inputs + column],
        };
        let before = matrix(rows * to);
        let expected: Vec<f32> = (0..rows * to)
            .map(|i| {
                let sum: f32 = (0..from).map(|k| term(i / to, i % to, k)).sum();
                sum + before[i] * f32::from(u8::from(kind == ProductKind::Backward))
            })
            .collect();
        let y = Numbers::new(driver, &before);
        let (x, w) = (Numbers::new(driver, &x), Numbers::new(driver, &w));
        let product = VendorProduct {
            kind,
            x: x.at,
            w: w.at,
            y: y.at,
            rows,
            inputs,
            outputs,
            from: Element::F32,
            to: Element::F32,
        };
        if !driver.product(Lane::Main, &product).unwrap() {
            println!("skipped: no library of the vendor's");
            return;
        }
        assert_eq!(y.get(Lane::Main), expected);
        y.set(Lane::Main, &before);
        let recording = driver.record(&mut || driver.product(Lane::Main, &product).map(|_| ()));
        driver.replay(&recording.unwrap()).unwrap();
        assert_eq!(y.get(Lane::Main), expected);
    }
}
