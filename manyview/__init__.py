"""Pretraining of vision encoders with many views. The folders beside this one are its parts: `manyview.pipeline`, ..."""
