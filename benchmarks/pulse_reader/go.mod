module isopod/pulse_reader

go 1.23.0
