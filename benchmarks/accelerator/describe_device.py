"""The device JAX computes on, as one JSON object."""

import json

import jax

if __name__ == "__main__":
    device = jax.devices()[0]
    print(json.dumps({"device": device.device_kind, "platform": device.platform, "jax": jax.__version__}))
