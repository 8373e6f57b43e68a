"""The bundled atlas: a case of each of its facts, made and not read (see data/atlas.py)."""

from editkit.data.atlas import atlas_benchmark, atlas_digest
from editkit.data.atlas_stream import AtlasStream
from editkit.data.formats import register

register("atlas", make=lambda seed: atlas_benchmark(seed=seed), digest=atlas_digest, stream=AtlasStream)
