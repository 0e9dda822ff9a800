"""One file per run, named; `stage1` turns a recipe into a trained tokenizer."""
