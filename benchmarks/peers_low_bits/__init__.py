"""Other tools' quantizers on the kit: `table` says what each offers, one file per tool runs it, `base` measures it."""
