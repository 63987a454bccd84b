"""Independent transcriptions of the mechanisms' formulas, one file each."""
