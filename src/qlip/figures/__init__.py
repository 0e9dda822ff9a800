"""The paper's figures, measured on our models: numbers as JSON, and a picture drawn from them."""
