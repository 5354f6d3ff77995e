"""How tokens reach their experts: on this rank (`local`) or through an exchange between ranks (`all_to_all`)."""
