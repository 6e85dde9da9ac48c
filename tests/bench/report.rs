//! Figures as Markdown, JSON and bar charts.

use std::fmt::Write as _;
use std::io::{Read, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;

/// One measured quantity, on stock and on ours; stock is empty where it has no such thing.
pub struct Row {
    name: String,
    unit: &'static str,
    stock: Vec<f64>,
    ours: Vec<f64>,
    more_is_better: bool,
}

impl Row {
    pub fn samples(name: &str, unit: &'static str, stock: Vec<f64>, ours: Vec<f64>) -> Self {
        Self { name: name.into(), unit, stock, ours, more_is_better: false }
    }

    pub fn one_sided(name: &str, unit: &'static str, ours: Vec<f64>) -> Self {
        Self::samples(name, unit, Vec::new(), ours)
    }

    pub fn more_is_better(mut self) -> Self {
        self.more_is_better = true;
        self
    }
}

fn quantile(samples: &[f64], q: f64) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = ((sorted.len().checked_sub(1)?) as f64 * q).round() as usize;
    sorted.get(at).copied()
}

fn shown(value: Option<f64>) -> String {
    value.map_or_else(
        || "–".into(),
        |v| if v < 10.0 { format!("{v:.2}") } else { format!("{v:.1}") },
    )
}

/// What one run has measured.
pub struct Report {
    handlers: [String; 2],
    rows: Vec<Row>,
    /// By what was measured until then.
    phases: Vec<(String, Vec<Phase>)>,
    notes: Vec<String>,
    load: String,
}

impl Report {
    pub fn new(handlers: &[String; 2]) -> Self {
        Self {
            handlers: handlers.clone(),
            rows: Vec::new(),
            phases: Vec::new(),
            notes: Vec::new(),
            load: std::fs::read_to_string("/proc/loadavg").unwrap_or_default(),
        }
    }

    pub fn row(&mut self, row: Row) {
        let [a, b] = [&row.stock, &row.ours].map(|s| shown(quantile(s, 0.5)));
        println!("  {}: {a} / {b} {}", row.name, row.unit);
        self.rows.push(row);
    }

    pub fn phases(&mut self, of: &str, phases: Vec<Phase>) {
        self.phases.push((of.into(), phases));
    }

    pub fn note(&mut self, text: &str) {
        self.notes.push(text.into());
    }

    fn markdown(&self) -> String {
        let [stock, ours] = &self.handlers;
        let cpus = std::thread::available_parallelism().map_or(0, usize::from);
        let mut out = format!(
            "# {ours} beside {stock}\n\n{cpus} CPUs, load average at the start {}. Both handlers interleaved in one run, \
             through CRI over gRPC; medians, with the 95th percentile in brackets.\n\n\
             | | unit | samples | {stock} | {ours} | ratio |\n|---|---|---|---|---|---|\n",
            self.load.split_whitespace().take(3).collect::<Vec<_>>().join(" ")
        );
        for r in &self.rows {
            let cell = |s: &[f64]| match s.len() {
                0 => "–".to_owned(),
                1..=3 => shown(quantile(s, 0.5)),
                _ => format!("{} ({})", shown(quantile(s, 0.5)), shown(quantile(s, 0.95))),
            };
            let ratio = match (quantile(&r.stock, 0.5), quantile(&r.ours, 0.5)) {
                (Some(a), Some(b)) if b > 0.0 => {
                    let times = if r.more_is_better { b / a } else { a / b };
                    format!("{times:.2} × {}", if times >= 1.0 { "better" } else { "worse" })
                }
                _ => "–".into(),
            };
            let _ = writeln!(
                out,
                "| {} | {} | {} | {} | {} | {ratio} |",
                r.name,
                r.unit,
                r.ours.len(),
                cell(&r.stock),
                cell(&r.ours)
            );
        }
        for (of, phases) in &self.phases {
            let _ = writeln!(
                out,
                "\n## The daemon's own share: {of} (from its metrics)\n\n| phase | p50 ms | p99 ms | mean ms | \
                 calls |\n|---|---|---|---|---|"
            );
            for p in phases {
                let [p50, p99, mean] = [p.p50, p.p99, p.mean].map(|v| shown(Some(v)));
                let _ = writeln!(out, "| {} | {p50} | {p99} | {mean} | {} |", p.name, p.calls);
            }
        }
        if !self.notes.is_empty() {
            let _ = writeln!(out, "\n## Notes\n");
            for note in &self.notes {
                let _ = writeln!(out, "- {note}");
            }
        }
        out
    }

    fn json(&self) -> serde_json::Value {
        let rows: Vec<_> = self
            .rows
            .iter()
            .map(|r| {
                json!({ "name": r.name, "unit": r.unit, "stock": r.stock, "ours": r.ours,
                             "more_is_better": r.more_is_better })
            })
            .collect();
        let phases: Vec<_> = self
            .phases
            .iter()
            .flat_map(|(of, phases)| phases.iter().map(move |p| (of, p)))
            .map(|(of, p)| json!({ "of": of, "phase": p.name, "mean_ms": p.mean, "p50_ms": p.p50, "p99_ms": p.p99, "calls": p.calls }))
            .collect();
        json!({ "handlers": self.handlers, "load": self.load.trim(), "rows": rows, "phases": phases, "notes": self.notes })
    }

    /// Bars of all rows of one unit.
    fn chart(&self, unit: &str) -> Option<String> {
        let rows: Vec<&Row> = self.rows.iter().filter(|r| r.unit == unit).collect();
        let largest = rows
            .iter()
            .flat_map(|r| [&r.stock, &r.ours])
            .filter_map(|s| quantile(s, 0.5))
            .fold(0.0, f64::max);
        if largest <= 0.0 {
            return None;
        }
        let (left, width, step) = (380.0, 420.0, 46.0);
        let height = 56.0 + step * rows.len() as f64;
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"900\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
             <rect width=\"900\" height=\"{height}\" fill=\"white\"/>\n\
             <text x=\"12\" y=\"24\" font-size=\"15\">{} (grey) and {} (blue), median, {unit}</text>\n",
            self.handlers[0], self.handlers[1]
        );
        for (i, r) in rows.iter().enumerate() {
            let y = 40.0 + step * i as f64;
            let _ = writeln!(
                out,
                "<text x=\"12\" y=\"{}\">{}</text>",
                y + 22.0,
                r.name.replace('&', "and")
            );
            for (k, (samples, colour)) in
                [(&r.stock, "#9e9e9e"), (&r.ours, "#1f6fb4")].into_iter().enumerate()
            {
                let Some(value) = quantile(samples, 0.5) else { continue };
                let top = y + 17.0 * k as f64;
                let w = width * value / largest;
                let _ = writeln!(
                    out,
                    "<rect x=\"{left}\" y=\"{top}\" width=\"{w:.1}\" height=\"14\" fill=\"{colour}\"/>"
                );
                let _ = writeln!(
                    out,
                    "<text x=\"{:.1}\" y=\"{}\">{}</text>",
                    left + w + 6.0,
                    top + 12.0,
                    shown(Some(value))
                );
            }
        }
        out.push_str("</svg>\n");
        Some(out)
    }

    /// Writes everything below `target/bench`; answers the directory.
    pub fn write(&self) -> PathBuf {
        let at = kuasar_tests::top().join("target/bench");
        std::fs::create_dir_all(&at).unwrap();
        let mut text = self.markdown();
        for (unit, name) in
            [("ms", "times"), ("MiB", "memory"), ("pods/s", "rate"), ("containers/s", "many")]
        {
            if let Some(chart) = self.chart(unit) {
                std::fs::write(at.join(format!("{name}.svg")), chart).unwrap();
                let _ = write!(text, "\n![{name}]({name}.svg)\n");
            }
        }
        std::fs::write(at.join("report.md"), text).unwrap();
        std::fs::write(at.join("report.json"), format!("{:#}\n", self.json())).unwrap();
        at
    }
}

/// The daemon's metrics, where it serves them.
pub fn scrape(socket: &Path) -> Option<String> {
    let mut s = UnixStream::connect(socket).ok()?;
    s.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    s.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").ok()?;
    let mut text = String::new();
    s.read_to_string(&mut text).ok()?;
    Some(text)
}

/// What the daemon's own histogram says of one phase, in milliseconds.
pub struct Phase {
    pub name: String,
    pub mean: f64,
    pub p50: f64,
    pub p99: f64,
    pub calls: u64,
}

/// The phases in a page of metrics. Percentiles are read from the buckets, as if calls were spread
/// evenly within each.
pub fn phases(text: &str) -> Vec<Phase> {
    let of = |line: &str| Some(line.split("phase=\"").nth(1)?.split('"').next()?.to_owned());
    let number = |line: &str| line.rsplit(' ').next()?.parse::<f64>().ok();
    let value = |kind: &str, phase: &str| {
        let head = format!("kuasar_phase_seconds_{kind}{{");
        let line =
            text.lines().find(|l| l.starts_with(&head) && of(l).as_deref() == Some(phase))?;
        number(line)
    };
    let quantile = |phase: &str, q: f64, count: f64| {
        let (mut below, mut lower) = (0.0, 0.0);
        for line in text.lines().filter(|l| l.starts_with("kuasar_phase_seconds_bucket{")) {
            let bound = line.split("le=\"").nth(1).and_then(|l| l.split('"').next());
            let bound = bound.and_then(|b| b.parse::<f64>().ok());
            let (Some(upper), Some(n)) = (bound, number(line)) else { continue };
            if of(line).as_deref() != Some(phase) || !upper.is_finite() {
                continue;
            }
            if n >= q * count && n > below {
                return (lower + (upper - lower) * (q * count - below) / (n - below)) * 1e3;
            }
            (below, lower) = (n, upper);
        }
        f64::INFINITY
    };
    text.lines()
        .filter(|l| l.starts_with("kuasar_phase_seconds_count{"))
        .filter_map(|l| {
            let name = of(l)?;
            let (count, sum) = (value("count", &name)?, value("sum", &name)?);
            (count > 0.0).then(|| Phase {
                mean: sum / count * 1e3,
                p50: quantile(&name, 0.5, count),
                p99: quantile(&name, 0.99, count),
                calls: count as u64,
                name,
            })
        })
        .collect()
}
