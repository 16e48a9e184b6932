"""What runs a tapped network over batches of images: device, precision, and the loop."""

import sys

# OpenVINO would import its telemetry, which writes an id into the home directory and fails where there is none; without
# the package it does nothing of the kind.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
