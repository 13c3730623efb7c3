"""`jaxent train | evaluate | tokens`: a language model on real text."""
