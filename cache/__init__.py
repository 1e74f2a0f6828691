"""The store of priors: schema, fingerprints, units, records. No torch."""
