"""The numerical work under the heads: row spans, curvature, hyperplanes, rows on a device."""
