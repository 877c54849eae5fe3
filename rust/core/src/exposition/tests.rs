use super::coding::{Coder, Combiner, Piece, Source};
use super::{Kind, Reading, Reason, Rules, protobuf, read};

fn rules<'a>() -> Rules<'a> {
    Rules {
        line_bytes_max: 65536,
        series_max: 20000,
        renames: vec![(b"go_", b"kata_shim_go_")],
        wrapped_min: 1.8e19,
        block: b"sandbox_id=\"s\"",
        names: vec![b"sandbox_id"],
        wanted: vec![(b"b", vec![b"c", b"e"])],
    }
}

fn text(reading: &Reading<'_>) -> String {
    reading.families.iter().map(|family| String::from_utf8_lossy(&reading.text[family.text.clone()]).into_owned()).collect()
}

fn joined(lines: impl Iterator<Item = String>) -> String {
    lines.collect::<Vec<_>>().concat()
}

#[test]
fn lines_come_labelled_by_family() {
    let body = b"b 1\n# TYPE go_a counter\n# HELP go_a A \\x\ngo_a{x=\"y\"} 2 3\nb{c=\"d\\n\",sandbox_id=\"t\"} 4\n";
    let reading = read(body, &rules());
    let expected =
        "b{sandbox_id=\"s\"} 1\nb{sandbox_id=\"s\",c=\"d\\n\",exported_sandbox_id=\"t\"} 4\nkata_shim_go_a{sandbox_id=\"s\",x=\"y\"} 2 3\n";
    assert_eq!(text(&reading), expected);
    assert_eq!(reading.dropped, [0; Reason::N]);
    assert_eq!(reading.n_series, 3);
    let [b, a] = &reading.families[..] else { panic!("two families") };
    assert_eq!((a.kind, a.help.as_ref()), (Kind::Counter, &b"A \\\\x"[..]));
    let open = a.open_text.clone().expect("seconds differ");
    assert_eq!(reading.text[open], *b"kata_shim_go_a{sandbox_id=\"s\",x=\"y\"} 2 0.003\n");
    let figures = b.figures.as_ref().expect("it was asked for");
    assert_eq!(figures[0], (vec![b""[..].into(), b""[..].into()], 1.0));
    assert_eq!(figures[1], (vec![b"d\n"[..].into(), b""[..].into()], 4.0));
    assert!(a.figures.is_none());
}

#[test]
fn words_are_those_of_reasons() {
    assert_eq!(Reason::WORDS[Reason::Name as usize], "name");
    assert_eq!(Reason::WORDS[Reason::TypeConflict as usize], "type_conflict");
    assert_eq!(Reason::WORDS[Reason::Incoherent as usize], "incoherent");
    assert_eq!(Reason::Incoherent as usize, Reason::N - 1);
}

/// How many comparisons `n` things may take: they are sorted at most, never each compared with each other.
fn bound(n: usize) -> usize {
    4 * n * (usize::BITS - n.leading_zeros()) as usize
}

#[test]
fn comparisons_grow_with_the_body_and_not_with_its_square() {
    let n = 20_000_usize;
    let ascending = joined((0..n).map(|i| format!("x{{a=\"{i:06}\"}} 1\n")));
    let descending = joined((0..n).rev().map(|i| format!("x{{a=\"{i:06}\"}} 1\n")));
    let repeated = joined((0..n).map(|i| format!("x{{a=\"{}\"}} 1\n", i % 7)));
    let zigzag = joined((0..n).map(|i| format!("x{}{{a=\"{}\"}} 1\n", i % 3, (n / 2).abs_diff(i))));
    for (body, kept) in [(&ascending, n), (&descending, n), (&repeated, 7), (&zigzag, n)] {
        let reading = read(body.as_bytes(), &rules());
        assert!(reading.n_series <= kept);
        assert!(reading.n_comparisons <= 3 * n, "{}", reading.n_comparisons);
    }
    let m = 6_000;
    let labels = joined((0..m).rev().map(|i| format!("a{i}=\"\",")));
    let body = format!("x{{{labels}}} 1\n");
    let reading = read(body.as_bytes(), &rules());
    assert_eq!(reading.n_series, 1);
    assert!(reading.n_comparisons <= bound(m), "{}", reading.n_comparisons);
}

#[test]
fn announcements_are_bounded() {
    let body = joined((0..100).map(|i| format!("# TYPE x{i} counter\n")));
    let reading = read(body.as_bytes(), &Rules { series_max: 10, ..rules() });
    assert_eq!(reading.dropped[Reason::TooMany as usize], 90);
}

#[test]
fn sums_of_pieces_make_that_of_the_whole() {
    let texts: Vec<Vec<u8>> =
        [0, 1, 7, 300, 300, 70_000].iter().map(|n| (0..*n).map(|i: u32| i.to_le_bytes()[0] ^ 0x5a).collect()).collect();
    let texts: Vec<&[u8]> = texts.iter().map(Vec::as_slice).collect();
    let sources: Vec<_> = texts.iter().map(|text| Source::Text(text)).collect();
    let [pack, frames] = ["gzip", "zstd"].map(|word| Coder::of(word).unwrap().unwrap().pack(&sources, b"").unwrap());
    let again: Vec<_> = (0..texts.len()).map(Source::Before).collect();
    assert_eq!(Coder::of("zstd").unwrap().unwrap().pack(&again, &frames).unwrap(), frames);
    assert!(Piece::of(&pack, texts.len()).is_none() && Piece::of(b"", 0).is_none() && Piece::of(&pack[..50], 4).is_none());
    let mut combiner = Combiner::default();
    let mut stream = Vec::new();
    for number in 0..texts.len() {
        let piece = Piece::of(&pack, number).unwrap();
        combiner.add(piece.crc32, piece.n_bytes.into());
        stream.extend_from_slice(piece.data);
    }
    let whole = texts.concat();
    let mut sum = flate2::Crc::new();
    sum.update(&whole);
    assert_eq!(combiner.finish(), sum.sum());
    stream.extend_from_slice(&[3, 0]); // a last block, empty
    let mut inflated = Vec::new();
    std::io::Read::read_to_end(&mut flate2::read::DeflateDecoder::new(&stream[..]), &mut inflated).unwrap();
    assert_eq!(inflated, whole);
    let frames: Vec<_> = (0..texts.len()).map(|number| Piece::of(&frames, number).unwrap().data).collect();
    assert_eq!(zstd::decode_all(&frames.concat()[..]).unwrap(), whole);
}

#[test]
fn a_gauge_as_protobuf() {
    let message = protobuf::family(b"x", Kind::Gauge, b"a\\nb", &[b"x{l=\"v\"} 1 5\n"]);
    let metric = b"\x0a\x06\x0a\x01l\x12\x01v\x12\x09\x09\0\0\0\0\0\0\xf0\x3f\x30\x05";
    let mut expected = b"\x0a\x01x\x12\x03a\nb\x18\x01\x22".to_vec();
    expected.push(u8::try_from(metric.len()).unwrap());
    expected.extend_from_slice(metric);
    assert_eq!(message[0] as usize, expected.len());
    assert_eq!(message[1..], expected);
}
