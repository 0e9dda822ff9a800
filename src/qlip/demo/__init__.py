"""What a tokenizer does, shown on the dozen photographs that the package ships: `qlip demo`."""
