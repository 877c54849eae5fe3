//! The mask of WebSocket frames (RFC 6455, section 5.3): every byte is combined with one of four, in turn.

/// Combine `data` with `key` repeated, into `out` of the same length. Doing it twice gives the data back.
///
/// # Panics
/// If the lengths differ.
pub fn apply(data: &[u8], key: [u8; 4], out: &mut [u8]) {
    assert_eq!(data.len(), out.len());
    let word = u32::from_ne_bytes(key);
    let wide = u64::from(word) | (u64::from(word) << 32);
    let mut sources = data.chunks_exact(8);
    let mut targets = out.chunks_exact_mut(8);
    for (source, target) in sources.by_ref().zip(targets.by_ref()) {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(source);
        target.copy_from_slice(&(u64::from_ne_bytes(bytes) ^ wide).to_ne_bytes());
    }
    // The rest begins at a multiple of 8, so at the key's first byte.
    for ((source, target), byte) in sources.remainder().iter().zip(targets.into_remainder()).zip(key.iter().cycle()) {
        *target = source ^ byte;
    }
}

#[cfg(test)]
mod tests {
    use super::apply;

    #[test]
    fn every_length_is_combined_byte_by_byte() {
        let key = [0x12, 0x00, 0xff, 0x7e];
        let data: Vec<u8> = (0..100_u8).map(|byte| byte.wrapping_mul(37)).collect();
        for n_bytes in 0..data.len() {
            let mut out = vec![0; n_bytes];
            apply(&data[..n_bytes], key, &mut out);
            let expected: Vec<u8> = data[..n_bytes].iter().enumerate().map(|(at, byte)| byte ^ key[at % 4]).collect();
            assert_eq!(out, expected);
            let mut back = vec![0; n_bytes];
            apply(&out, key, &mut back);
            assert_eq!(back, data[..n_bytes]);
        }
    }
}
