def write_report(plan, study):
    return "-"
