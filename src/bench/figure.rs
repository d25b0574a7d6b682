//! What was measured, what it is held against, and whether that is good enough. No effects.

use std::time::Duration;

use serde::Serialize;

use crate::report::bytes;

/// One thing that was measured several times.
#[derive(Debug, Clone, PartialEq)]
pub struct Figure {
    /// What it is, and against whom.
    pub name: String,
    /// What the numbers count.
    pub unit: Unit,
    /// cannery's numbers.
    pub ours: Vec<f64>,
    /// The other's.
    pub peer: Peer,
    /// What ours should be.
    pub goal: Goal,
}

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Unit {
    /// Time.
    Seconds,
    /// Room, on the wire, on a disk or in memory.
    Bytes,
    /// Bytes a second.
    Throughput,
    /// Things.
    Count,
}

/// Whom a figure is held against.
#[derive(Debug, Clone, PartialEq)]
pub enum Peer {
    /// Nobody.
    None,
    /// Somebody who could not be asked, and why.
    Missing(&'static str),
    /// Somebody with these numbers.
    Numbers(Vec<f64>),
}

/// What the median should be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Goal {
    /// Nothing: it is only to be seen.
    None,
    /// Less than this time.
    Under(Duration),
    /// Less than so many bytes.
    Below(u64),
    /// At most so many times the peer's.
    Times(f64),
    /// At most so much more than the peer's.
    Beyond(Duration),
    /// At least such a part of the peer's: more is better.
    Share(f64),
    /// Nothing at all may be counted.
    Zero,
}

/// One line of a bench's answer; the JSON's keys are these names. Numbers are medians.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// What was measured.
    pub figure: String,
    /// What the numbers count.
    pub unit: Unit,
    /// cannery's median.
    pub ours: f64,
    /// The peer's median, where there is a peer.
    pub peer: Option<f64>,
    /// How many times the peer's median ours is.
    pub ratio: Option<f64>,
    /// The goal in words, or why it is not judged; none where there is none.
    pub goal: Option<String>,
    /// Is the goal met? Also true where nothing could be judged.
    pub ok: bool,
    /// Was there something to judge?
    #[serde(skip)]
    pub judged: bool,
}

impl Figure {
    /// A figure of times, none of which was taken yet.
    pub fn new(name: impl Into<String>, peer: Peer, goal: Goal) -> Self {
        Figure {
            name: name.into(),
            unit: Unit::Seconds,
            ours: Vec::new(),
            peer,
            goal,
        }
    }

    /// A figure of bytes, nothing of which was counted yet.
    pub fn of_bytes(name: impl Into<String>, peer: Peer, goal: Goal) -> Self {
        Figure {
            unit: Unit::Bytes,
            ..Self::new(name, peer, goal)
        }
    }

    /// A figure of bytes a second, none of which was taken yet.
    pub fn of_throughput(name: impl Into<String>, peer: Peer, goal: Goal) -> Self {
        Figure {
            unit: Unit::Throughput,
            ..Self::new(name, peer, goal)
        }
    }

    /// A figure of things that were counted.
    pub fn of_count(name: impl Into<String>, counted: usize, goal: Goal) -> Self {
        let mut figure = Figure {
            unit: Unit::Count,
            ..Self::new(name, Peer::None, goal)
        };
        figure.counted(u64::try_from(counted).unwrap_or(u64::MAX));
        figure
    }

    /// Adds a transfer of cannery's.
    pub fn carried(&mut self, bytes: u64, time: Duration) {
        self.ours.push(number(bytes) / time.as_secs_f64());
    }

    /// Adds a transfer of the peer's.
    pub fn peer_carried(&mut self, bytes: u64, time: Duration) {
        self.peer_number(number(bytes) / time.as_secs_f64());
    }

    /// The time in which this part of all were done, from 0 to 1, as a figure without a goal.
    pub fn quantile(&self, name: impl Into<String>, part: f64) -> Self {
        let at = |numbers: &[f64]| quantile(numbers, part).into_iter().collect();
        Figure {
            name: name.into(),
            unit: self.unit,
            ours: at(&self.ours),
            peer: match &self.peer {
                Peer::Numbers(numbers) => Peer::Numbers(at(numbers)),
                other => other.clone(),
            },
            goal: Goal::None,
        }
    }

    /// Adds a time of cannery's.
    pub fn took(&mut self, time: Duration) {
        self.ours.push(time.as_secs_f64());
    }

    /// Adds a time of the peer's.
    pub fn peer_took(&mut self, time: Duration) {
        self.peer_number(time.as_secs_f64());
    }

    /// Adds bytes of cannery's.
    pub fn counted(&mut self, bytes: u64) {
        self.ours.push(number(bytes));
    }

    /// Adds bytes of the peer's.
    pub fn peer_counted(&mut self, bytes: u64) {
        self.peer_number(number(bytes));
    }

    fn peer_number(&mut self, number: f64) {
        match &mut self.peer {
            Peer::Numbers(numbers) => numbers.push(number),
            other => *other = Peer::Numbers(vec![number]),
        }
    }

    /// Takes in the numbers of another round of the same.
    pub fn add(&mut self, round: Self) {
        self.ours.extend(round.ours);
        if let Peer::Numbers(numbers) = round.peer {
            numbers.into_iter().for_each(|number| self.peer_number(number));
        }
    }

    /// The line of the answer; `None` where nothing was measured.
    pub fn row(&self) -> Option<Row> {
        let ours = median(&self.ours)?;
        let (peer, missing) = match &self.peer {
            Peer::None => (None, None),
            Peer::Missing(why) => (None, Some(*why)),
            Peer::Numbers(numbers) => (median(numbers), None),
        };
        let words = self.goal.words();
        Some(Row {
            figure: self.name.clone(),
            unit: self.unit,
            ours: rounded(ours, 1e6),
            peer: peer.map(|peer| rounded(peer, 1e6)),
            ratio: peer.filter(|p| *p > 0.0).map(|p| rounded(ours / p, 1e4)),
            goal: match (words, missing) {
                (Some(words), Some(why)) => Some(format!("{words} ({why})")),
                (words, why) => words.or(why.map(str::to_owned)),
            },
            ok: self.goal.is_met(ours, peer),
            judged: self.goal != Goal::None && missing.is_none(),
        })
    }
}

impl Goal {
    fn words(self) -> Option<String> {
        match self {
            Goal::None => None,
            Goal::Under(most) => Some(format!("< {}", time(most.as_secs_f64()))),
            Goal::Below(most) => Some(format!("< {}", bytes(most))),
            Goal::Times(most) => Some(format!("≤ {most:.2} × peer")),
            Goal::Beyond(most) => Some(format!("≤ peer + {}", time(most.as_secs_f64()))),
            Goal::Share(least) => Some(format!("≥ {least:.2} × peer")),
            Goal::Zero => Some("none".to_owned()),
        }
    }

    /// Seconds, or bytes, are compared; without a peer there is nothing to miss.
    fn is_met(self, ours: f64, peer: Option<f64>) -> bool {
        match (self, peer) {
            (Goal::Under(most), _) => ours < most.as_secs_f64(),
            (Goal::Below(most), _) => ours < number(most),
            (Goal::Times(most), Some(peer)) => ours <= peer * most,
            (Goal::Beyond(most), Some(peer)) => ours <= peer + most.as_secs_f64(),
            (Goal::Share(least), Some(peer)) => ours >= peer * least,
            (Goal::Zero, _) => ours == 0.0,
            (Goal::None, _) | (Goal::Times(_) | Goal::Beyond(_) | Goal::Share(_), None) => true,
        }
    }
}

impl Row {
    /// The heading of a table of rows.
    pub const HEADING: [&'static str; 6] = ["FIGURE", "OURS", "PEER", "RATIO", "GOAL", "OK"];

    /// The line of the table.
    pub fn cells(&self) -> Vec<String> {
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        vec![
            match self.goal {
                Some(_) => self.figure.clone(),
                // A part of something that has one.
                None => format!("  {}", self.figure),
            },
            self.unit.written(self.ours),
            or_dash(self.peer.map(|peer| self.unit.written(peer))),
            or_dash(self.ratio.map(|r| format!("{r:.2}"))),
            or_dash(self.goal.clone()),
            match (self.judged, self.ok) {
                (_, false) => "MISSED",
                (true, true) => "yes",
                (false, true) => "-",
            }
            .to_owned(),
        ]
    }
}

impl Unit {
    fn written(self, value: f64) -> String {
        match self {
            Unit::Seconds => time(value),
            Unit::Bytes => bytes(whole(value)),
            Unit::Throughput => format!("{}/s", bytes(whole(value))),
            Unit::Count => whole(value).to_string(),
        }
    }
}

/// No file is so long that its bytes are counted less than exactly.
#[expect(clippy::cast_precision_loss, reason = "exact below 8 PiB")]
fn number(bytes: u64) -> f64 {
    bytes as f64
}

/// What [`number`] made of bytes, and means of such.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a count of bytes is neither negative nor beyond u64"
)]
fn whole(value: f64) -> u64 {
    value as u64
}

/// The middle one, or the mean of the two in the middle.
fn median(numbers: &[f64]) -> Option<f64> {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    match sorted.len() % 2 {
        0 => Some((sorted.get(middle - 1)? + upper) / 2.0),
        _ => Some(upper),
    }
}

/// The smallest number that this part of all does not exceed.
fn quantile(numbers: &[f64], part: f64) -> Option<f64> {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    let count = u64::try_from(sorted.len()).ok()?;
    let rank = whole((number(count) * part).ceil()).clamp(1, count.max(1));
    sorted.get(usize::try_from(rank - 1).ok()?).copied()
}

/// To whole parts of one: microseconds, where they are seconds. No clock here is worth more digits.
fn rounded(value: f64, parts: f64) -> f64 {
    (value * parts).round() / parts
}

/// `85 µs`, `9.4 ms`, `412 ms`, `5.21 s`
fn time(seconds: f64) -> String {
    match seconds * 1e3 {
        ms if ms < 0.9995 => format!("{:.0} µs", ms * 1e3),
        ms if ms < 99.95 => format!("{ms:.1} ms"),
        ms if ms < 999.5 => format!("{ms:.0} ms"),
        _ => format!("{seconds:.2} s"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ms(times: &[u64]) -> Vec<f64> {
        let seconds = |ms: &u64| Duration::from_millis(*ms).as_secs_f64();
        times.iter().map(seconds).collect()
    }

    fn row(ours: &[u64], peer: Peer, goal: Goal) -> Row {
        let mut figure = Figure::new("x", peer, goal);
        figure.ours = ms(ours);
        figure.row().unwrap()
    }

    #[test]
    fn medians_are_compared_and_not_means() {
        let row = row(
            &[100, 900, 110],
            Peer::Numbers(ms(&[100, 104, 90, 106])),
            Goal::Times(1.1),
        );
        assert_eq!((row.ours, row.peer), (0.11, Some(0.102)));
        assert_eq!(row.ratio, Some(1.0784));
        assert!(row.ok);
    }

    #[test]
    fn each_goal_has_its_edge() {
        let peer = || Peer::Numbers(ms(&[1000]));
        let beyond = Goal::Beyond(Duration::from_millis(300));
        let under = Goal::Under(Duration::from_millis(15));
        for (ours, peer, goal, ok) in [
            (14, Peer::None, under, true),
            (15, Peer::None, under, false),
            (1050, peer(), Goal::Times(1.05), true),
            (1051, peer(), Goal::Times(1.05), false),
            (1300, peer(), beyond, true),
            (1301, peer(), beyond, false),
            (9999, peer(), Goal::None, true),
        ] {
            assert_eq!(row(&[ours], peer, goal).ok, ok, "{ours} {goal:?}");
        }
    }

    #[test]
    fn a_peer_that_is_not_there_is_named_and_misses_nothing() {
        let row = row(&[5], Peer::Missing("not installed"), Goal::Times(1.0));
        assert!(row.ok);
        assert_eq!(row.goal.as_deref(), Some("≤ 1.00 × peer (not installed)"));
        assert_eq!((row.peer, row.ratio), (None, None));
        let json = serde_json::to_value(&row).unwrap();
        let keys: Vec<&str> = json.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, ["figure", "unit", "ours", "peer", "ratio", "goal", "ok"]);
        assert!(json["peer"].is_null());
    }

    #[test]
    fn the_table_tells_what_is_missed_and_what_was_not_judged() {
        let judged = |row: Row| row.cells()[5].clone();
        let two = || Peer::Numbers(ms(&[2000]));
        assert_eq!(judged(row(&[3000], two(), Goal::Times(1.0))), "MISSED");
        assert_eq!(judged(row(&[1000], two(), Goal::Times(1.0))), "yes");
        assert_eq!(judged(row(&[1000], two(), Goal::None)), "-");
        assert_eq!(judged(row(&[1000], Peer::Missing("gone"), Goal::Times(1.0))), "-");
        assert_eq!(
            row(&[5200], two(), Goal::Beyond(Duration::from_millis(300))).cells(),
            ["x", "5.20 s", "2.00 s", "2.60", "≤ peer + 300 ms", "MISSED"]
        );
    }

    #[test]
    fn bytes_are_judged_and_shown_as_bytes() {
        let mut figure = Figure::of_bytes("x", Peer::None, Goal::Below(200 << 20));
        figure.counted(150 << 20);
        assert_eq!(
            figure.row().unwrap().cells(),
            ["x", "150.0 MiB", "-", "-", "< 200.0 MiB", "yes"]
        );
        figure.peer_counted(300 << 20);
        let mut round = Figure::of_bytes("x", Peer::None, Goal::None);
        round.counted(450 << 20);
        round.peer_counted(300 << 20);
        figure.add(round);
        let row = figure.row().unwrap();
        assert_eq!((row.ratio, row.ok), (Some(1.0), false));
    }

    #[test]
    fn more_is_better_where_throughput_is_judged() {
        let judged = |ours: u64| {
            let mut figure = Figure::of_throughput("x", Peer::None, Goal::Share(0.9));
            figure.carried(ours << 20, Duration::from_secs(2));
            figure.peer_carried(100 << 20, Duration::from_secs(1));
            figure.row().unwrap()
        };
        assert_eq!(
            judged(180).cells(),
            ["x", "90.0 MiB/s", "100.0 MiB/s", "0.90", "≥ 0.90 × peer", "yes"]
        );
        assert!(!judged(179).ok);
    }

    #[test]
    fn what_must_not_be_there_is_counted() {
        let row = |count| Figure::of_count("x", count, Goal::Zero).row().unwrap();
        assert_eq!(row(0).cells(), ["x", "0", "-", "-", "none", "yes"]);
        assert_eq!(row(2).cells(), ["x", "2", "-", "-", "none", "MISSED"]);
    }

    #[test]
    fn a_quantile_is_one_of_the_times() {
        let mut figure = Figure::new("x", Peer::None, Goal::Under(Duration::from_millis(1)));
        figure.ours = ms(&(1..=100).rev().collect::<Vec<_>>());
        figure.peer_took(Duration::from_micros(250));
        let row = figure.quantile("x, 99 of 100", 0.99).row().unwrap();
        assert_eq!((row.ours, row.ok), (0.099, true));
        assert_eq!(row.cells()[..3], ["  x, 99 of 100", "99.0 ms", "250 µs"]);
        for (count, part, wanted) in [(1, 0.5, 1), (1, 0.0, 1), (4, 0.5, 2), (4, 1.0, 4)] {
            let numbers = ms(&(1..=count).collect::<Vec<_>>());
            assert_eq!(quantile(&numbers, part), Some(ms(&[wanted])[0]), "{count} {part}");
        }
        assert_eq!(quantile(&[], 0.5), None);
    }

    #[test]
    fn nothing_measured_is_no_row() {
        assert_eq!(Figure::new("x", Peer::None, Goal::None).row(), None);
    }

    proptest! {
        #[test]
        fn half_of_the_times_lie_on_either_side_of_the_median(times in proptest::collection::vec(0..10_000_u64, 1..40)) {
            let times = ms(&times);
            let middle = median(&times).unwrap();
            let count = |side: fn(f64, f64) -> bool| times.iter().filter(|t| side(**t, middle)).count();
            prop_assert!(2 * count(|t, m| t < m) <= times.len());
            prop_assert!(2 * count(|t, m| t > m) <= times.len());
        }
    }
}
