"""The numerical work under the heads: row spaces, curvature, scores of hyperplanes, rows on a device."""
