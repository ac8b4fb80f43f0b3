"""The bundled model: a small Llama whose massive weights grew in training, and the recipe that made it."""
