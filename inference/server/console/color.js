// Colours. Scales are straight lines in OKLab, where equal steps look equally large; none of them needs red beside green.

/** OKLCH (lightness 0 to 1, chroma, hue in degrees) as OKLab. */
function lab([lightness, chroma, hue]) {
  const angle = (hue * Math.PI) / 180;
  return [lightness, chroma * Math.cos(angle), chroma * Math.sin(angle)];
}

/** OKLab as sRGB, 0 to 255 (Ottosson 2020). */
function rgb([L, a, b]) {
  const l = (L + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (L - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (L - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ].map((x) => {
    const c = Math.min(1, Math.max(0, x));
    return Math.round(255 * (c <= 0.0031308 ? 12.92 * c : 1.055 * c ** (1 / 2.4) - 0.055));
  });
}

/** A scale from 0 to 1 through OKLCH colours at equal distances, as a function to CSS. */
function scale(...stops) {
  const points = stops.map(lab);
  const steps = 128;
  const table = Array.from({ length: steps + 1 }, (_, i) => {
    const place = (i / steps) * (points.length - 1);
    const low = Math.min(points.length - 2, Math.floor(place));
    const part = place - low;
    return `rgb(${rgb(points[low].map((x, k) => x + (points[low + 1][k] - x) * part)).join(" ")})`;
  });
  return (t) => table[Math.round(Math.min(1, Math.max(0, t)) * steps)];
}

const SCALES = {
  dark: {
    balance: scale([0.8, 0.12, 235], [0.5, 0.12, 250], [0.27, 0.015, 260], [0.56, 0.12, 60], [0.86, 0.13, 80]),
    surprise: scale([0.255, 0.02, 262], [0.38, 0.11, 320], [0.55, 0.19, 345]),
  },
  light: {
    balance: scale([0.36, 0.13, 262], [0.66, 0.12, 250], [0.955, 0.006, 95], [0.72, 0.14, 60], [0.44, 0.12, 42]),
    surprise: scale([1.0, 0.0, 340], [0.88, 0.08, 340], [0.74, 0.17, 350]),
  },
};

// Okabe and Ito's eight, told apart by everybody; then hues at the golden angle in three lightnesses.
const FEW = ["#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#0072b2", "#d55e00", "#f0e442", "#8c8c8c"];

/** The colour of an expert, the same everywhere on the page. */
export function expertColor(expert, experts) {
  if (experts <= FEW.length) return FEW[expert];
  return `rgb(${rgb(lab([[0.72, 0.6, 0.82][expert % 3], 0.13, (expert * 137.508) % 360])).join(" ")})`;
}

/** Names → colours of the theme that is on; canvases can not read CSS variables. */
export class Theme {
  constructor(names) {
    this.names = names;
    this.read();
  }

  read() {
    const probe = document.createElement("i");
    document.body.append(probe);
    for (const name of this.names) {
      probe.style.color = `var(--${name})`;
      this[name] = getComputedStyle(probe).color;
    }
    this.sans = getComputedStyle(document.body).fontFamily;
    probe.remove();
    this.dark = this.isDark();
    Object.assign(this, SCALES[this.dark ? "dark" : "light"]);
  }

  isDark() {
    const chosen = document.documentElement.dataset.theme;
    return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  }
}
