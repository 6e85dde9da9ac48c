//! Counters, gauges and histograms with labels, rendered together with [`crate::metrics`].
//!
//! Names and label names are constants of the program. Label values may come from outside, so
//! each metric keeps at most [`MAX_SERIES`] of them; further ones share the value `other`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Most combinations of label values that one metric keeps.
pub const MAX_SERIES: usize = 128;

/// Longest label value, in bytes; the rest is cut off.
const MAX_VALUE: usize = 64;

/// Upper bounds of histogram buckets, in seconds.
const BUCKETS: [f64; 10] = [0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0, 120.0];

enum Value {
    Number(f64),
    Histogram { buckets: [u64; BUCKETS.len()], sum: f64, count: u64 },
}

struct Metric {
    kind: &'static str,
    labels: &'static [&'static str],
    series: BTreeMap<Vec<String>, Value>,
}

static ALL: Mutex<BTreeMap<&'static str, Metric>> = Mutex::new(BTreeMap::new());

fn change(
    name: &'static str,
    kind: &'static str,
    labels: &'static [&'static str],
    values: &[&str],
    edit: impl FnOnce(&mut Value),
) {
    let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
    let new = || Metric { kind, labels, series: BTreeMap::new() };
    let metric = all.entry(name).or_insert_with(new);
    if metric.kind != kind || metric.labels != labels {
        // A name means one thing; the second meaning is a mistake of the program.
        return;
    }
    let cut =
        |v: &str| v.char_indices().take_while(|(i, _)| *i < MAX_VALUE).map(|(_, c)| c).collect();
    let padded = values.iter().copied().chain(std::iter::repeat("")).take(labels.len());
    let mut key: Vec<String> = padded.map(cut).collect();
    if !metric.series.contains_key(&key) && metric.series.len() >= MAX_SERIES {
        key = vec!["other".into(); labels.len()];
    }
    let zero = || match kind {
        "histogram" => Value::Histogram { buckets: [0; BUCKETS.len()], sum: 0.0, count: 0 },
        _ => Value::Number(0.0),
    };
    edit(metric.series.entry(key).or_insert_with(zero));
}

/// A number that only grows, such as `kuasar_exits_total`.
#[derive(Debug, Clone, Copy)]
pub struct Counter {
    /// Name; ends in `_total`.
    pub name: &'static str,
    /// Names of its labels.
    pub labels: &'static [&'static str],
}

impl Counter {
    /// Adds `n` for these label values.
    pub fn add(&self, values: &[&str], n: u64) {
        change(self.name, "counter", self.labels, values, |v| {
            if let Value::Number(x) = v {
                *x += n as f64;
            }
        });
    }
}

/// A number that goes up and down.
#[derive(Debug, Clone, Copy)]
pub struct Gauge {
    /// Name, with its unit at the end.
    pub name: &'static str,
    /// Names of its labels.
    pub labels: &'static [&'static str],
}

impl Gauge {
    /// Sets it for these label values.
    pub fn set(&self, values: &[&str], to: f64) {
        change(self.name, "gauge", self.labels, values, |v| *v = Value::Number(to));
    }

    /// Forgets these label values, of a helper that has ended for example.
    pub fn remove(&self, values: &[&str]) {
        let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(metric) = all.get_mut(self.name) {
            let key: Vec<String> = values.iter().map(|v| (*v).to_owned()).collect();
            metric.series.remove(&key);
        }
    }
}

/// Durations in fixed buckets from 1 ms to 2 min.
#[derive(Debug, Clone, Copy)]
pub struct Histogram {
    /// Name; ends in `_seconds`.
    pub name: &'static str,
    /// Names of its labels.
    pub labels: &'static [&'static str],
}

impl Histogram {
    /// Books a duration for these label values.
    pub fn observe(&self, values: &[&str], took: Duration) {
        let seconds = took.as_secs_f64();
        change(self.name, "histogram", self.labels, values, |v| {
            if let Value::Histogram { buckets, sum, count } = v {
                *sum += seconds;
                *count += 1;
                for (bucket, bound) in buckets.iter_mut().zip(BUCKETS) {
                    *bucket += u64::from(seconds <= bound);
                }
            }
        });
    }

    /// Books the time until the timer is dropped.
    pub fn timer<'a>(&'a self, values: &'a [&'a str]) -> Timer<'a> {
        Timer { histogram: self, values, begun: std::time::Instant::now() }
    }
}

/// Books its own lifetime; see [`Histogram::timer`].
#[derive(Debug)]
pub struct Timer<'a> {
    histogram: &'a Histogram,
    values: &'a [&'a str],
    begun: std::time::Instant,
}

impl Drop for Timer<'_> {
    fn drop(&mut self) {
        self.histogram.observe(self.values, self.begun.elapsed());
    }
}

/// All metrics in Prometheus' text format.
pub(crate) fn render() -> String {
    let mut out = String::new();
    let all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
    // Writing to a String cannot fail.
    for (name, metric) in all.iter() {
        let _ = writeln!(out, "# TYPE {name} {}", metric.kind);
        for (values, value) in &metric.series {
            let labels: Vec<String> = metric
                .labels
                .iter()
                .zip(values)
                .map(|(l, v)| format!("{l}=\"{}\"", escape(v)))
                .collect();
            let with = |more: Option<String>| {
                let all: Vec<String> = labels.iter().cloned().chain(more).collect();
                if all.is_empty() { String::new() } else { format!("{{{}}}", all.join(",")) }
            };
            match value {
                Value::Number(n) => {
                    let _ = writeln!(out, "{name}{} {n}", with(None));
                }
                Value::Histogram { buckets, sum, count } => {
                    for (n, bound) in buckets.iter().zip(BUCKETS) {
                        let le = with(Some(format!("le=\"{bound}\"")));
                        let _ = writeln!(out, "{name}_bucket{le} {n}");
                    }
                    let le = with(Some("le=\"+Inf\"".into()));
                    let _ = writeln!(out, "{name}_bucket{le} {count}");
                    let _ = writeln!(out, "{name}_sum{} {sum}", with(None));
                    let _ = writeln!(out, "{name}_count{} {count}", with(None));
                }
            }
        }
    }
    out
}

fn escape(value: &str) -> String {
    let mut out = String::new();
    for c in value.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '"' => out.push_str("\\\""),
            '\n' => out.push_str("\\n"),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_from_outside_are_bounded_and_escaped() {
        let c = Counter { name: "test_bounded_total", labels: &["who"] };
        c.add(&["a\"\n} 7"], 2);
        for i in 0..MAX_SERIES * 2 {
            c.add(&[&i.to_string()], 1);
        }
        c.add(&[&"x".repeat(10_000)], 1);
        let text = render();
        let lines = text.lines().filter(|l| l.starts_with("test_bounded_total{")).count();
        assert_eq!(lines, MAX_SERIES + 1);
        assert!(text.contains(r#"test_bounded_total{who="a\"\n} 7"} 2"#), "{text}");
        assert!(text.contains(r#"test_bounded_total{who="other"} 130"#), "{text}");
    }

    #[test]
    fn gauges_go_and_histograms_add_up() {
        let g = Gauge { name: "test_gauge_bytes", labels: &["helper"] };
        g.set(&["vmm"], 5.0);
        assert!(render().contains("test_gauge_bytes{helper=\"vmm\"} 5"));
        g.remove(&["vmm"]);
        assert!(!render().contains("helper=\"vmm\""));
        let h = Histogram { name: "test_took_seconds", labels: &[] };
        h.observe(&[], Duration::from_millis(20));
        drop(h.timer(&[]));
        let text = render();
        assert!(text.contains("test_took_seconds_bucket{le=\"0.05\"} 2"), "{text}");
        assert!(text.contains("test_took_seconds_count 2"));
    }
}
